"""Reads a GGUF file (llama.cpp's format): dequantized weights, sizes, and the tokenizer in its metadata."""

import dataclasses
import functools
import struct
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from gguf import (
    MODEL_ARCH,
    GGUFEndian,
    GGUFReader,
    GGUFValueType,
    ReaderTensor,
    TokenType,
    dequantize,
    get_tensor_name_map,
)
from jax.sharding import Mesh
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.core.bounds import bounds_of, require
from br_jax.core.errors import UserError, one_line
from br_jax.core.io import require_file
from br_jax.models.attention import rope_angles
from br_jax.models.io.hf import Stored, load_params, tensor_names
from br_jax.models.io.hf_config import FAMILIES
from br_jax.models.spec import ModelSpec, RopeScaling

# What a corrupt or truncated file makes the reader and the dequantizer raise.
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError, struct.error)
_MAX_VALUES = 3_000_000  # Gemma-3, of the largest vocabulary, has 262,144 tokens
_ROPE_DIVISORS = "rope_freqs.weight"  # not a weight: what each rope frequency is divided by
# What the metadata calls a field of `ModelSpec`.
_FIELDS = {
    "vocab_size": "vocab_size", "context_length": "max_length", "embedding_length": "embed_dim",
    "block_count": "num_layers", "feed_forward_length": "ffw_dim", "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attention_soft_cap", "final_logit_softcapping": "logit_soft_cap",
    "attention.sliding_window": "window",
}  # fmt: skip
# Of Gemma-2, what no file says, and what early ones do not; no other model has any of it.
_GEMMA2 = {"activation": "gelu_tanh", "attention_soft_cap": 50.0, "logit_soft_cap": 30.0, "window": 4096}
_OF_GEMMA2 = tuple(key for key, field in _FIELDS.items() if field in _GEMMA2)
_OPTIONAL = ("vocab_size", "attention.head_count_kv", "attention.key_length", "rope.freq_base", *_OF_GEMMA2)
_ONLY = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0, "attention.causal": True}
_NEEDED = object()  # for a default: the file must say it
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")


class _Reader(GGUFReader):
    """Of plain arrays over the mapped file, faster than `memmap`s; one that ends early, or counts too far, raises."""

    _values = 0

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)

    def _get(self, offset: int, dtype, count: int = 1, override_order: str | None = None) -> np.ndarray:
        self._count(1)
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(f"it ends early, in what is at byte {offset:,}")
        return values

    def _count(self, more: int) -> None:
        self._values += more
        if self._values > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values")

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        """As the package has it, but a list of numbers is one part, and texts have a quick loop of their own."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        at, item = orig_offs + 12, GGUFValueType(kind[0])
        types, parts = [GGUFValueType.ARRAY, item], [kind, count]
        if number := self.gguf_scalar_to_np.get(item):
            parts.append(self._get(at, number, count[0]))
            return 12 + parts[-1].nbytes, parts, [2], types
        if item != GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        self._count(int(count[0]))
        length = struct.Struct("<Q" if self.endianess == GGUFEndian.LITTLE else ">Q").unpack_from
        for _ in range(count[0]):
            start = at + 8
            at = start + length(self._data, at)[0]
            parts.append(self._data[start:at])
        if at > len(self._data):
            raise ValueError(f"it ends early, in the array at byte {orig_offs:,}")
        return at - orig_offs, parts, [*range(2, len(parts))], types


class GGUFFile:
    """The file at `path`, with errors that name it and the key; its `tensors` are mapped, not read."""

    def __init__(self, path: str | Path):
        require_file(path)
        try:
            reader = _Reader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except _BROKEN as error:
            raise UserError(
                f"{path}: not a GGUF file, or a truncated or damaged one ({one_line(error)}): check the path or "
                "download it again"
            ) from error
        self.path, self.tensors = path, reader.tensors

    def get(self, key: str, default: Any = _NEEDED, *, among: Collection = (), items: type | None = None) -> Any:
        """The value of a key: one `among` those that are implemented, or a list of `items` of one kind."""
        if key not in self.metadata and default is _NEEDED:
            raise UserError(f"{self.path}: metadata {key} is missing: convert it again with a current llama.cpp")
        value = self.metadata.get(key, default)
        if among and value not in (*among,):
            raise UserError(f"{self.path}: {key} is {value!r}, only {', '.join(map(str, among))} is supported")
        if items and not (isinstance(value, list) and all(isinstance(item, items) for item in value)):
            raise UserError(f"{self.path}: {key} is no list of {items.__name__}: convert it again")
        return value

    def token(self, name: str, count: int) -> int | None:
        """The id of a named token, e.g. "eos", below `count`; None where the file does not say."""
        key = f"tokenizer.ggml.{name}_token_id"
        if (index := self.get(key, None)) is not None and (type(index) is not int or not 0 <= index < count):
            raise UserError(f"{self.path}: {key} is {one_line(repr(index))}, but there are {count} tokens")
        return index


def read_gguf(
    path: str | Path, dtype="float32", mesh: Mesh | None = None
) -> tuple[ModelSpec, dict, PreTrainedTokenizerFast, tuple[int, ...]]:
    """Reads a GGUF file of one of `ARCHITECTURES`, of any quantization that the `gguf` package knows.

    Arguments and result are those of `hf.read_hf`; weights are dequantized exactly, to float32, and rounded once.
    """
    file = GGUFFile(path)
    spec = _spec(file)
    # llama.cpp's name of each tensor, from transformers'.
    known, names = get_tensor_name_map(MODEL_ARCH[spec.model_type.upper()], 1), {}
    for leaf, theirs in tensor_names(spec).items():
        if name := known.get_name(theirs.format(0), (".weight", ".bias")):
            names[leaf] = name.replace("blk.0.", "blk.{}.")
    tensors = {
        each.name: Stored((*map(int, each.shape[::-1]),), str(path), functools.partial(_Weight, each, spec, path))
        for each in file.tensors
        if each.name != _ROPE_DIVISORS
    }
    tokenizer = read_tokenizer(file, spec)
    params = load_params(spec, names, tensors, str(path), jnp.dtype(dtype), mesh)
    # The ends of a turn and of a message: what chat models say where plain ones say EOS. Where a file does not say, as
    # Gemma-2's does not, they are known by their texts, as llama.cpp's llama-vocab.cpp looks for them.
    stops, vocab = [], tokenizer.get_vocab()
    for name, texts in (("eot", ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")), ("eom", ("<|eom_id|>",))):
        index = file.token(name, spec.vocab_size)
        stops.append(next((vocab[text] for text in texts if text in vocab), None) if index is None else index)
    return spec, params, tokenizer, tuple(index for index in stops if index is not None)


def read_gguf_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file, without its weights."""
    return _spec(GGUFFile(path))


def describe_gguf(path: str | Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec; and how many tensors of each of its "dtypes", "tokens", and whether there is a "chat_template"."""
    file = GGUFFile(path)
    return _spec(file), {
        "dtypes": dict(Counter(tensor.tensor_type.name for tensor in file.tensors)),
        "tokens": len(file.get("tokenizer.ggml.tokens", [], items=str)),
        "chat_template": bool(file.get("tokenizer.chat_template", None)),
    }


def _spec(file: GGUFFile) -> ModelSpec:
    """The spec of the same model's config.json, without transformers; what is left out is llama.cpp's default."""
    family = file.get("general.architecture", None, among=ARCHITECTURES)
    known = {name for name in _FIELDS if family == "gemma2" or name not in _OF_GEMMA2}
    known |= {"attention.value_length", "rope.dimension_count", *_ONLY}
    for key in file.metadata:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in known:
            raise UserError(
                f"{file.path}: {key} is {file.get(key)!r}: br_jax does not know this key, and leaving it out could "
                "change the model's answers"
            )
    for key, value in _ONLY.items():
        file.get(f"{family}.{key}", value, among=(value,))
    fields, bounds = {}, bounds_of(ModelSpec)
    for name, field in _FIELDS.items():
        value = file.get(f"{family}.{name}", None if name in _OPTIONAL else _NEEDED)
        if value is not None:
            require(f"{file.path}: {family}.{name}", value, bounds[field])  # before it is reckoned with
            fields[field] = value
    heads, width = fields["num_heads"], fields["embed_dim"]
    fields = {"num_kv_heads": heads, "head_dim": width // heads} | fields
    fields["norm_eps"] = _as_written(fields["norm_eps"])
    # Gemma-2's head is the embedding: neither llama.cpp nor transformers reads another.
    fields["tie_embeddings"] = family == "gemma2" or all(tensor.name != "output.weight" for tensor in file.tensors)
    if "vocab_size" not in fields:
        fields["vocab_size"] = len(file.get("tokenizer.ggml.tokens", items=str))
    for key in ("attention.value_length", "rope.dimension_count"):
        file.get(f"{family}.{key}", fields["head_dim"], among=(fields["head_dim"],))
    if family == "gemma2":
        # As llama.cpp's src/models/gemma2.cpp has it, for no file says it: 27B, with its 46 layers, scales by D / N.
        query_scale = (width // heads if fields["num_layers"] == 46 else fields["head_dim"]) ** -0.5
        windowed = tuple(layer % 2 == 0 for layer in range(fields["num_layers"]))
        fields = _GEMMA2 | fields | {"query_scale": query_scale, "windowed": windowed}
    try:
        spec = ModelSpec(model_type=family, **fields, **FAMILIES[family])
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    stored = [tensor for tensor in file.tensors if tensor.name == _ROPE_DIVISORS]
    return dataclasses.replace(spec, rope_scaling=_rope_scaling(stored[0], spec, file.path) if stored else None)


def _as_written(number: float) -> float:
    """A number as it was in the original config, e.g. 1e-5: 7 digits of what float32 made of it."""
    return float(f"{number:.7g}")


def _rope_scaling(stored: ReaderTensor, spec: ModelSpec, path: str | Path) -> RopeScaling:
    """Llama-3.1's scaling, of which llama.cpp keeps no more than its effect, the tensor `_ROPE_DIVISORS`."""
    divisors = _dequantize(stored.data, stored, path)
    # The slowest frequencies are divided by the whole factor; the rest is the same in all of Meta's models.
    factor = _as_written(divisors.max(initial=1))
    try:
        scaling = RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    except UserError as error:
        raise UserError(f"{path}: tensor {_ROPE_DIVISORS}: {error}") from error
    plain, scaled = (
        np.asarray(rope_angles(jnp.ones((1, 1)), dataclasses.replace(spec, rope_scaling=how)))[0, 0]
        for how in (None, scaling)
    )
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-4, atol=0):
        raise UserError(f"{path}: tensor {_ROPE_DIVISORS}: rope factors other than Llama-3.1's are not supported")
    return scaling


class _Weight:
    """One tensor as Hugging Face has it, float32 [out, in]: rows are dequantized when they are asked for."""

    def __init__(self, tensor: ReaderTensor, spec: ModelSpec, path: str | Path):
        self._tensor, self._path, self._order = tensor, path, None
        # A map of its own, as `hf._tensors` has it.
        self._data = np.memmap(path, tensor.data.dtype, "r", tensor.data_offset, tensor.data.shape)
        self._plus_one = spec.norm_plus_one and tensor.name.endswith("norm.weight")  # as the converter writes it
        if spec.model_type == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp's rope turns rows (0, 1), (2, 3), ... of a head; ours turns (i, i + H/2).
            pairs = np.arange(len(tensor.data)).reshape(-1, spec.head_dim // 2, 2)
            self._order = pairs.swapaxes(1, 2).reshape(-1)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index
        stored = self._data[rows if self._order is None else self._order[rows]]
        weight = _dequantize(stored, self._tensor, self._path)[:, *columns]
        return weight - 1 if self._plus_one else weight


def _dequantize(stored: np.ndarray, tensor: ReaderTensor, path: str | Path) -> np.ndarray:
    """Float32 of some of a tensor's rows."""
    try:
        with np.errstate(all="ignore"):  # `load_params` refuses NaN and infinity
            return dequantize(stored, tensor.tensor_type)
    except (NotImplementedError, *_BROKEN) as error:
        tensor_name = f"{tensor.name} ({tensor.tensor_type.name})"
        raise UserError(f"{path}: tensor {tensor_name} cannot be dequantized: {error}") from error


# The tokenizer: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama"). The metadata names the rules that cut a text
# into words; the rules themselves are the makers' own, from their tokenizer.json. transformers has converters too, but
# none that one may rely on: 5.2 makes a Unigram model of Gemma's tokenizer, 5.24 ignores `add_space_prefix` and loses a
# space that a text begins with, both forget SmolLM's digits.


class Words(NamedTuple):
    """How a text is cut into words before a byte-level BPE, and what else goes with that."""

    pattern: str | None = None  # a word's, or None for GPT-2's
    digits: bool = False  # each digit is a word of its own, whatever the pattern says
    composed: bool = False  # the text is brought to Unicode's composed form first (NFC)
    whole: bool = False  # a word that is a token is that token, whatever the merges say
    bos: bool = False  # a text begins with BOS where the file does not say (llama.cpp's src/llama-vocab.cpp has it so)


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {
    "smollm": Words(digits=True),
    "qwen2": Words(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), composed=True),
    **dict.fromkeys(("gpt-2", "default"), Words()),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Words(_LLAMA3, whole=True, bos=True)),
}
_SPACE = "▁"  # SentencePiece's
_NAMED = {"eos_token": "eos", "bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(file: GGUFFile, spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer that the metadata describes, for a model with that vocabulary and context."""
    rebuild = {"gpt2": _byte_level, "llama": _sentencepiece}
    rebuild = rebuild[file.get("tokenizer.ggml.model", None, among=rebuild)]
    file.get("tokenizer.ggml.add_eos_token", False, among=(False,))
    tokens = file.get("tokenizer.ggml.tokens", items=str)
    types = file.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens), items=int)
    distinct = len(set(tokens))
    if not distinct == len(tokens) == len(types) or len(tokens) > spec.vocab_size:
        raise UserError(
            f"{file.path}: {len(tokens)} tokens, {distinct} of them different, {len(types)} token types "
            f"and {spec.vocab_size} embeddings do not go together"
        )
    kinds = dict(zip(tokens, types, strict=True))
    backend, bos = rebuild(file, kinds)
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [AddedToken(token, special=special, normalized=False) for token in kinds if kinds[token] == kind]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    add_bos = bool(file.get("tokenizer.ggml.add_bos_token", bos))
    for name in ("eos", "bos") if add_bos else ("eos",):
        file.get(f"tokenizer.ggml.{name}_token_id")
    ids = {name: file.token(theirs, len(kinds)) for name, theirs in _NAMED.items()}
    if ids["pad_token"] is None:
        ids["pad_token"] = ids["eos_token"]  # masks never look at ids
    template = file.get("tokenizer.chat_template", None)
    if not isinstance(template, str | None):
        raise UserError(f"{file.path}: tokenizer.chat_template is no text: convert it again")
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    rest = {"chat_template": template, "model_max_length": spec.max_length, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, add_bos_token=add_bos, **rest, **names)


def _byte_level(file: GGUFFile, kinds: dict[str, int]) -> tuple[Tokenizer, bool]:
    """(A BPE over the bytes of a text's words, whether it adds BOS if the file does not say)."""
    words = WORDS[file.get("tokenizer.ggml.pre", None, among=WORDS)]
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", items=str)]
    backend = Tokenizer(_bpe(file, kinds, merges, ignore_merges=words.whole))
    if words.composed:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
    steps += [pre_tokenizers.Split(Regex(words.pattern), "isolated")] if words.pattern else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, words.bos


def _sentencepiece(file: GGUFFile, kinds: dict[str, int]) -> tuple[Tokenizer, bool]:
    """(A BPE over the characters of a whole text, whether it adds BOS if the file does not say)."""
    # SentencePiece joins the two neighbors that make the piece of the highest score. A character that is no piece is
    # its bytes. A space, "▁", is put before the text and before what follows an added token, as llama.cpp has it.
    scores = file.get("tokenizer.ggml.scores", items=float)
    if len(scores) != len(kinds):
        raise UserError(f"{file.path}: {len(kinds)} tokens and {len(scores)} tokenizer.ggml.scores")
    for byte in range(256):
        if f"<0x{byte:02X}>" not in kinds and not (byte < 128 and chr(byte) in kinds):
            raise UserError(f"{file.path}: tokenizer.ggml.tokens has no <0x{byte:02X}>: a text could not be read")
    pieces = {
        token: score for (token, kind), score in zip(kinds.items(), scores, strict=True) if kind == TokenType.NORMAL
    }
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(pieces, key=pieces.get, reverse=True)
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]
    backend = Tokenizer(_bpe(file, kinds, merges, byte_fallback=True))
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", left=1)] if prefix else []))
    return backend, True


def _bpe(file: GGUFFile, kinds: dict[str, int], merges: list[tuple[str, ...]], **how) -> BPE:
    try:
        return BPE(vocab={token: i for i, token in enumerate(kinds)}, merges=merges, **how)
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens: {one_line(error)}") from error
