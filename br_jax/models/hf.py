"""Hugging Face model folders of the Llama family, in and out: config.json, safetensors, tokenizer files."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from br_jax.errors import UserError
from br_jax.models.layout import stack_tensors, unstack_tensors
from br_jax.models.spec import ModelSpec

TENSOR_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
FLOATS = ("float32", "bfloat16", "float16")
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def read_hf(path: str | Path, dtype=np.float32) -> tuple[ModelSpec, dict, PreTrainedTokenizerFast]:
    """Reads a Llama-family folder; nothing is fetched and no code or pickle in it is run.

    Args:
        path: folder with config.json, model.safetensors (or its shards and index) and tokenizer.json.
        dtype: dtype of the params returned; the files may hold float32, bfloat16 or float16.

    Returns:
        The spec; the params tree as numpy arrays (see `decoder`); the tokenizer.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unexpected or of a wrong shape
            or dtype, or config.json asks for something that the decoder does not compute.
    """
    folder = Path(path)
    spec = read_hf_spec(folder)
    tensors = _tensors(folder)
    if spec.tie_embeddings and "lm_head.weight" in tensors:
        _check_tied(folder, tensors)
    tokenizer = _tokenizer(folder, spec)
    return spec, stack_tensors(spec, TENSOR_NAMES, tensors, str(folder), dtype), tokenizer


def read_hf_spec(path: str | Path) -> ModelSpec:
    """The spec of a folder, from its config.json alone; raises as `read_hf`."""
    return _spec(Path(path) / "config.json")


def write_hf(path: str | Path, spec: ModelSpec, params: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes a folder that `read_hf` and transformers load; it appears whole or not at all.

    Args:
        path: folder to make; an earlier model folder there is replaced, anything else is refused.
        spec: sizes of the model.
        params: params tree, written in its own dtype (float32, bfloat16 or float16).
        tokenizer: its files go beside the weights.

    Raises:
        UserError: the folder holds something else, or cannot be written (permissions, full disk).
    """
    folder = Path(path)
    if folder.exists() and not _replaceable(folder):
        raise UserError(f"{folder}: exists and is no model folder: choose another place or remove it")
    tensors = unstack_tensors(spec, TENSOR_NAMES, params)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
            whole = Path(staging) / "model"
            whole.mkdir()
            save_file(tensors, whole / _WEIGHTS, metadata={"format": "pt"})
            config = _config(spec, tensors["model.embed_tokens.weight"].dtype.name, tokenizer)
            (whole / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            tokenizer.save_pretrained(whole)
            if folder.exists():
                os.rename(folder, Path(staging) / "replaced")
            os.rename(whole, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written: {reason}") from error


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _config(spec: ModelSpec, dtype: str, tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffw_dim,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "max_position_embeddings": spec.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": dtype,
    }


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def _spec(path: Path) -> ModelSpec:
    config = _read_json(path)
    # transformers 5 keeps theta and the scaling together, earlier versions apart; null means none.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling or rope_parameters is {rope!r}, not an object")
    settings = {**config, "rope_type": rope.get("rope_type", rope.get("type"))}
    only = {
        "model_type": ("llama",),
        "rope_type": (None, "default"),
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "quantization_config": (None,),
    }
    for key, allowed in only.items():
        if settings.get(key) not in allowed:
            raise UserError(f"{path}: {key} is {settings.get(key)!r}, only {allowed[-1]!r} is supported")

    def number(key: str, default=None, kind=int):
        value = config.get(key) if config.get(key) is not None else default
        if isinstance(value, bool) or not isinstance(value, int | kind) or value <= 0:
            raise UserError(f"{path}: {key} is {value!r}, not a positive {kind.__name__}")
        return kind(value)

    heads = number("num_attention_heads")
    try:
        return ModelSpec(
            vocab_size=number("vocab_size"),
            embed_dim=number("hidden_size"),
            num_layers=number("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", number("hidden_size") // heads),
            ffw_dim=number("intermediate_size"),
            rope_theta=number("rope_theta", rope.get("rope_theta", 10000.0), float),
            norm_eps=number("rms_norm_eps", 1e-6, float),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_length=number("max_position_embeddings", 2048),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _tensors(folder: Path) -> dict:
    """For each tensor of the folder's safetensors files a function that loads it."""
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not files or any(Path(name).name != name for name in files):
            raise UserError(f"{folder / _INDEX}: weight_map must give file names of this folder")
    else:
        files = [_WEIGHTS]
    tensors = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file: weights are read from safetensors only")
        tensors |= _open_shard(folder / name)
    # Old checkpoints carry rope's frequencies, which follow from rope_theta.
    return {name: load for name, load in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _open_shard(path: Path) -> dict:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}): download it again") from error

    def loader(name: str):
        def load() -> np.ndarray:
            with safe_open(path, framework="np") as file:
                tensor = file.get_tensor(name)
            if tensor.dtype.name not in FLOATS:
                raise UserError(f"{path}: tensor {name} is {tensor.dtype.name}: only {'/'.join(FLOATS)}")
            return tensor

        return load

    return {name: loader(name) for name in names}


def _check_tied(folder: Path, tensors: dict) -> None:
    """Drops a tied head that was written out all the same, unless it is another matrix than the embedding."""
    embedding, head = tensors["model.embed_tokens.weight"](), tensors.pop("lm_head.weight")()
    if embedding.shape != head.shape or (embedding != head).any():
        raise UserError(f"{folder}: lm_head.weight differs from the embedding that it is tied to")


def _tokenizer(folder: Path, spec: ModelSpec) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file: save the tokenizer there as a fast tokenizer")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer that can be loaded: {error}") from error
    if len(tokenizer) > spec.vocab_size:
        raise UserError(f"{path}: {len(tokenizer)} tokens for an embedding of {spec.vocab_size} rows")
    return tokenizer
