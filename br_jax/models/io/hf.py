"""Hugging Face model folders, in and out: safetensors (whole or in shards), config.json, tokenizer files.

A checkpoint's tensors are [out, in], one name a layer; our params are [L, in, out], scanned.
"""

import collections
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import PICKLES, read_json, require_file, require_replaceable, safetensors_header, staged
from br_jax.core.mesh import shardings
from br_jax.core.progress import progress
from br_jax.models.decoder import abstract_params
from br_jax.models.io.hf_config import read_config, write_config
from br_jax.models.spec import KERNELS, ModelSpec

_SCORE = "score.weight"  # transformers' head of every sequence classifier
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")
_READERS, _BLOCK = 2, 1 << 21  # threads that read tensors, and numbers that each holds beside the params
_LINE = 64  # bytes
_STRIP = 16  # rows of a kernel that are turned at a time: a line of the processor's caches of f32
# Of the files that transformers may make a tokenizer from; the bytes of the largest known, Gemma-3's, are 33 million.
_TOKENIZER_ENDINGS, _MAX_TOKENIZER = (".json", ".jinja", ".model", ".txt", ".tiktoken"), 40_000_000
# What goes with the weights, beside config.json, when a folder is written after another.
_BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "added_tokens.json",
           "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*")  # fmt: skip


class Stored(NamedTuple):
    """A tensor of a checkpoint, before it is read."""

    shape: tuple[int, ...]  # as stored
    file: str  # which holds it, for messages
    open: Callable[[], Any]  # gives an object whose slices are numpy arrays, which is let go of after use


class Unstacked(NamedTuple):
    """A tensor to be written: its size, and a function that fetches it."""

    nbytes: int
    fetch: Callable[[], np.ndarray]


def tensor_names(spec: ModelSpec) -> dict[str, str]:
    """transformers' tensor name of each params path; "{}" stands for the layer."""
    layer = "model.layers.{}."
    norms = {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        "attn/q_norm": "self_attn.q_norm",
        "attn/k_norm": "self_attn.k_norm",
    }
    names = {"embed/embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight"}
    names |= {"head/kernel": "lm_head.weight"}
    names |= {f"layers/{ours}/scale": f"{layer}{theirs}.weight" for ours, theirs in norms.items()}
    for kernel in KERNELS:
        ours, theirs = ("attn", "self_attn") if kernel in "qkvo" else ("mlp", "mlp")
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
            names[f"layers/{ours}/{kernel}/{leaf}"] = f"{layer}{theirs}.{kernel}_proj.{suffix}"
    return names


def load_params(
    spec: ModelSpec,
    names: Mapping[str, str],  # the checkpoint's, of each params path; "{}" in one stands for the layer
    tensors: Mapping[str, Stored],
    where: str,  # the checkpoint, for messages
    dtype,
    mesh: Mesh | None = None,
) -> dict:
    """Reads a checkpoint's tensors into the params tree; each must be used once, fit and be finite.

    Beside the params, the host holds a few blocks of `_BLOCK` numbers. What a process' devices do not hold is not read.
    """
    tree = abstract_params(spec, dtype)
    leaves = flatten_dict(tree, sep="/")
    places = dict.fromkeys(leaves) if mesh is None else flatten_dict(shardings(tree, mesh), sep="/")
    keys = {path: _per_layer(names[path], spec.num_layers) for path in leaves}
    expected = {key for path in leaves for key in keys[path]}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all): download again")
    if extra := sorted(tensors.keys() - expected):
        raise UserError(
            f"{where}: unexpected tensor {extra[0]} ({len(extra)} in all): not the {spec.model_type} model "
            f"of {spec.num_layers} layers that its config describes"
        )
    params = {}
    with progress(len(expected), "load", "tensor", keep=False) as bar:
        for path, leaf in leaves.items():
            params[path] = _load_leaf(path, leaf, {key: tensors[key] for key in keys[path]}, places[path])
            bar.update(len(keys[path]))
    return unflatten_dict(params, sep="/")


def _load_leaf(path: str, leaf: jax.ShapeDtypeStruct, tensors: Mapping[str, Stored], place) -> jax.Array:
    """One param: what this process' devices hold of it, turned and cast by the host as it is read."""
    # Kernels are [in, out] here and [out, in] in every checkpoint; embeddings are [V, D] in both.
    stacked, turned = path.startswith("layers/"), path.endswith("/kernel")
    shape = leaf.shape[1:] if stacked else leaf.shape
    stored_shape = shape[::-1] if turned else shape
    everything = tuple(map(slice, leaf.shape))
    indices = [everything] if place is None else place.addressable_devices_indices_map(leaf.shape).values()

    def bounds(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(each.indices(size)[:2] for each, size in zip(index, leaf.shape, strict=True))

    parts = {part: _empty([end - start for start, end in part], leaf.dtype) for part in set(map(bounds, indices))}

    def read(layer: int, key: str, tensor: Stored) -> None:
        if tensor.shape != stored_shape:
            raise UserError(f"{tensor.file}: tensor {key} has shape {tensor.shape}, the sizes say {stored_shape}")
        opened = tensor.open()
        for part, array in parts.items():
            axes = part[1:] if stacked else part
            (start, end), *columns = axes[::-1] if turned else axes
            target = array[layer] if stacked else array
            target = target.T if turned else target
            rows = max(_STRIP, _BLOCK // math.prod(tensor.shape[1:]))
            for first in range(start, end, rows):
                values = opened[(slice(first, min(first + rows, end)), *(slice(*each) for each in columns))]
                if not np.isfinite(values).all():
                    raise UserError(f"{tensor.file}: tensor {key} holds NaN or infinity: the weights are damaged")
                step = _STRIP if turned else rows  # numpy takes three times as long to turn a whole matrix
                for strip in range(0, len(values), step):
                    some = values[strip : strip + step]
                    at = first - start + strip
                    target[at : at + len(some)] = some

    with ThreadPoolExecutor(_READERS) as pool:  # whose work is numpy's, which lets go of Python's lock
        collections.deque(pool.map(read, range(len(tensors)), tensors, tensors.values()), maxlen=0)
    if place is None:
        return jax.device_put(parts[bounds(everything)])
    return jax.make_array_from_callback(leaf.shape, place, lambda index: parts[bounds(index)])


def _empty(shape: Sequence[int], dtype) -> np.ndarray:
    """`np.empty` where a line of the processor's caches begins: JAX takes such an array as it is, without a copy."""
    count = math.prod(shape) * dtype.itemsize
    room = np.empty(count + _LINE, np.uint8)
    first = -room.ctypes.data % _LINE
    return room[first : first + count].view(dtype).reshape(shape)


def _per_layer(name: str, layers: int) -> list[str]:
    return [name.format(layer) for layer in range(layers)] if "{}" in name else [name]


def unstack_tensors(spec: ModelSpec, names: Mapping[str, str], params: dict) -> dict[str, Unstacked]:
    """The exact inverse of `load_params`, a tensor at a time: contiguous, in the params' dtype, kernels [out, in]."""

    def fetch(leaf, index, turned: bool) -> np.ndarray:
        tensor = np.asarray(leaf[index])
        return np.ascontiguousarray(tensor.T if turned else tensor)

    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        keys = _per_layer(names[path], spec.num_layers)
        for i, key in enumerate(keys):
            one = functools.partial(fetch, leaf, i if "{}" in names[path] else ..., path.endswith("/kernel"))
            tensors[key] = Unstacked(leaf.nbytes // len(keys), one)
    return tensors


def read_hf(
    path: str | Path, dtype="float32", mesh: Mesh | None = None
) -> tuple[ModelSpec, dict, PreTrainedTokenizerFast, tuple[int, ...]]:
    """Reads a model folder; nothing is fetched and no code or pickle in it is run.

    The params are of `dtype` (the files may hold float32, bfloat16 or float16), where `load_params` puts them; the
    tokenizer is the one that transformers would use; last come the tokens that end an answer by generation_config.json.
    """
    folder = Path(path)
    spec = read_hf_spec(folder)
    tensors = _tensors(folder)
    if spec.tie_embeddings and (head := tensors.pop("lm_head.weight", None)):  # written out all the same
        embedding = tensors.get("model.embed_tokens.weight", head)
        if embedding.shape != head.shape or (embedding.open()[:] != head.open()[:]).any():
            raise UserError(f"{folder}: lm_head.weight differs from the embedding that it is tied to")
    tokenizer, file = read_tokenizer(folder, spec), folder / "generation_config.json"
    file = file if file.exists() else folder / "config.json"
    ids = read_json(file).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and 0 <= i < spec.vocab_size for i in ids):
        raise UserError(f"{file}: eos_token_id is {one_line(repr(ids))}, not token ids below {spec.vocab_size}")
    params = load_params(spec, tensor_names(spec), tensors, str(folder), jnp.dtype(dtype), mesh)
    return spec, params, tokenizer, tuple(ids)


class Classifier(NamedTuple):
    """A sequence classifier, as transformers' `LlamaForSequenceClassification` and its like."""

    spec: ModelSpec  # of the decoder, which has no head of its own (`tie_embeddings`)
    params: dict  # the decoder's
    head: Float[np.ndarray, "labels D"]  # f32
    labels: tuple[str, ...]  # in the head's order
    tokenizer: PreTrainedTokenizerFast
    pad_token_id: int | None  # config.json's; transformers reads a text at its last token that is another


def read_classifier(path: str | Path, dtype="float32", mesh: Mesh | None = None) -> Classifier:
    """Reads a sequence classifier's folder as `read_hf`; its labels must have names and must not exclude each other."""
    folder, file = Path(path), Path(path) / "config.json"
    config = read_json(file)
    spec = dataclasses.replace(read_config(config, file), tie_embeddings=True)
    tensors = _tensors(folder)
    stored = tensors.pop(_SCORE, None)
    if stored is None:
        raise UserError(f"{folder}: tensor {_SCORE} is missing: not a sequence classifier as transformers saves it")
    head = np.asarray(stored.open()[:], np.float32)
    if head.ndim != 2 or head.shape[1] != spec.embed_dim or not np.isfinite(head).all():
        raise UserError(
            f"{stored.file}: tensor {_SCORE}, {stored.shape}, is not [labels, {spec.embed_dim}] of finite numbers"
        )
    rows, named = [str(row) for row in range(len(head))], config.get("id2label")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{file}: id2label is missing: name the classifier's {len(rows)} labels there")
    if set(named) != set(rows) or config.get("num_labels", len(rows)) != len(rows):
        raise UserError(
            f"{file}: id2label has {len(named)} labels, {_SCORE} has {len(rows)} rows: name 0 to {len(rows) - 1}, one "
            "for each"
        )
    if (kind := config.get("problem_type")) not in (None, "multi_label_classification"):
        raise UserError(f"{file}: problem_type is {kind!r}: only multi_label_classification, whose labels stand alone")
    tokenizer, labels = read_tokenizer(folder, spec), tuple(str(named[row]) for row in rows)
    params = load_params(spec, tensor_names(spec), tensors, str(folder), jnp.dtype(dtype), mesh)
    return Classifier(spec, params, head, labels, tokenizer, config.get("pad_token_id"))


def read_hf_spec(path: str | Path) -> ModelSpec:
    """The spec of a folder, from its config.json alone."""
    config = Path(path) / "config.json"
    return read_config(read_json(config), config)


def write_hf(
    path: str | Path,
    spec: ModelSpec,
    params: dict,
    tokenizer: PreTrainedTokenizerFast,
    *,
    like: str | Path | None = None,  # where the model came from: its config, tokenizer and license are copied
    stop_tokens: Sequence[int] = (),  # that end an answer beside EOS, where there is no such folder
    shard_bytes: int = 5 * 10**9,  # a weights file's largest size, which the host holds at a time
) -> None:
    """Writes a folder that `read_hf` and transformers load, in the params' dtype; it appears whole or not at all.

    An earlier model folder there is replaced, anything else is refused.
    """
    folder = Path(path)
    require_replaceable(folder, "model", ("config.json",))
    tensors = unstack_tensors(spec, tensor_names(spec), params)
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with staged(folder) as new:
        for file, names in shards.filename_to_tensors.items():
            save_file({name: tensors[name].fetch() for name in names}, new / file, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (new / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if like is None:
            tokenizer.save_pretrained(new)
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config = write_config(spec) | ids
            stops = list(dict.fromkeys([*stop_tokens, tokenizer.eos_token_id]))
            if len(stops) > 1:
                (new / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}) + "\n")
        else:
            config = read_json(Path(like) / "config.json")
            for file in sorted({file for pattern in _BESIDE for file in Path(like).glob(pattern)}):
                if file.suffix in PICKLES:
                    continue
                # A link may lead to a Buffer: none leads out of the folder, but for those of the Hub's cache.
                target = file.resolve()
                cached = file.is_symlink() and target.parent.name == "blobs"
                if target.parent != Path(like).resolve() and not cached:
                    raise UserError(f"{file}: is a link to {target}: put the file itself in its place")
                require_file(file, _MAX_TOKENIZER)
                shutil.copyfile(file, new / file.name)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(params["embed"]["embedding"].dtype)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in new.glob("*.safetensors"):  # which are written for their owner alone
            shutil.copymode(new / "config.json", file)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in order; a `UserError` where one is missing or weights are pickled."""
    names = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or any(Path(str(n)).name != n for n in index.values()):
            raise UserError(f"{folder / _INDEX}: weight_map must give file names of this folder")
        names = sorted(set(index.values()))
    for file in (files := [folder / name for name in names]):
        if file.suffix != ".safetensors" or not file.is_file():
            pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
            why = f": {pickled[0]} is pickled and can run code; convert it to safetensors" if pickled else ""
            raise UserError(f"{file}: no such file: weights are read from safetensors only{why}")
    return files


def _tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of the folder's safetensors files, none of them read yet."""

    def open_one(path: Path, name: str):
        # A file of its own for each: the memory that a file is mapped to is given back tensor by tensor.
        return safe_open(path, framework="np").get_slice(name)

    tensors = {}
    for path in weight_files(folder):
        for name, (dtype, shape) in safetensors_header(path)[0].items():
            if dtype not in _FLOATS:
                raise UserError(f"{path}: tensor {name} is {dtype}: only {', '.join(_FLOATS)}; quantized: use GGUF")
            tensors[name] = Stored(shape, str(path), functools.partial(open_one, path, name))
    # Old checkpoints carry rope's frequencies, which follow from rope_theta.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def read_tokenizer(folder: Path, spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers would use; all its tokens have an embedding.

    It is made of regular files of `_MAX_TOKENIZER` bytes at most, and its chat template is rendered with limits (see
    `data.templates`). What its own rules make of a text is not bounded: a normalizer may write a book for a letter.
    """
    from transformers import AutoTokenizer  # here, for it imports torch where torch is installed

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file: save the tokenizer there as a fast tokenizer")
    for file in (*folder.iterdir(), *folder.glob("chat_templates/*")):
        if file.suffix in _TOKENIZER_ENDINGS:
            require_file(file, _MAX_TOKENIZER, "save the tokenizer again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        highest = max(tokenizer.get_vocab().values(), default=-1)
        tokenizer("zorvix", return_offsets_mapping=True, verbose=False)  # what makes every text fail is told here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises nothing narrower, and panics with a kind of its own
        raise UserError(f"{path}: not a tokenizer that can be loaded: {one_line(error)}") from error
    if highest >= spec.vocab_size:
        raise UserError(f"{path}: has a token {highest}, for an embedding of {spec.vocab_size} rows")
    return tokenizer
