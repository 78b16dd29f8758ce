"""`load_model`: one door for every kind of base: a GGUF file, a Hugging Face folder, or a provider's folder."""

import json
import os
import pathlib

from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.peft import load_adapter
from br_jax.errors import UserError
from br_jax.models.gguf import read_gguf, read_gguf_spec
from br_jax.models.hf import read_hf, read_hf_spec
from br_jax.models.hub import fetch_config, fetch_model, is_hub_name
from br_jax.models.model import Model, make_model
from br_jax.models.spec import ModelSpec

PROVIDER_FILE = "provider.json"
_RECORDED = ("base", "template", "dtype", "fingerprint")
_SOURCES = "give a GGUF file, a Hugging Face folder, a model's name on the Hub or a provider's folder"


def load_model(
    source: str | os.PathLike,
    *,
    template: str = "chat",
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    cache: str | os.PathLike | None = None,
) -> Model:
    """Loads a frozen base.

    Args:
        source: a GGUF file; a Hugging Face folder (config.json and safetensors) or the name of a model on the Hub; or a
            provider's folder, which gives the aligned base: the model that provider.json names, with the align adapter
            folded in.
        template: "chat" (the model's own) or "alpaca" (the paper's); a provider's folder brings its own.
        dtype: compute dtype of the params, "float32" or "bfloat16"; None is float32, or what a provider's folder
            records.
        mesh: devices that the params are laid on by `sharding`'s table, each part read straight to its device; None is
            JAX's default device.
        revision: of a model on the Hub: branch, tag or commit.
        cache: folder of converted weights, see `models.cache`; None converts at each load.

    Returns:
        The model.

    Raises:
        UserError: what is there is missing, damaged, of an unsupported family, or not what provider.json recorded.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: use float32 or bfloat16")
    name = pathlib.Path(source).name
    path = _locate(source, revision)
    if (path / PROVIDER_FILE).is_file():
        return _load_aligned(path, dtype, mesh, cache)
    if not path.exists():
        raise UserError(f"{path}: no such model: {_SOURCES}")
    read = read_hf if path.is_dir() else read_gguf
    spec, params, tokenizer, stops = read(path, dtype or "float32", mesh, cache)
    return make_model(spec, params, tokenizer, name.removesuffix(".gguf"), template, stops)


def read_spec(source: str | os.PathLike, revision: str | None = None) -> ModelSpec:
    """The sizes of the model at a GGUF file, in a Hugging Face folder or on the Hub, without its weights.

    Raises:
        UserError: as `load_model`.
    """
    path = fetch_config(str(source), revision) if is_hub_name(source) else pathlib.Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such model: {_SOURCES}")
    return read_hf_spec(path) if path.is_dir() else read_gguf_spec(path)


def fold_adapter(model: Model, adapter: lora.Adapter, name: str) -> Model:
    """A new model with an adapter added into its weights (in f32, rounded once to their dtype)."""
    params = lora.fold(model.params, adapter)
    return make_model(model.spec, params, model.tokenizer, name, model.template, model.stop_tokens)


def read_provider(folder: pathlib.Path) -> dict:
    """What provider.json records, with its "base" as a path or a Hub name that can be loaded from anywhere.

    Raises:
        UserError: the file is damaged, or no such record.
    """
    file = folder / PROVIDER_FILE
    try:
        record = json.loads(file.read_text())
        source, *_ = (record[name] for name in _RECORDED)
        base = source if is_hub_name(source) and not (folder / source).exists() else str(folder / source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a provider's record ({error}): make the folder again") from error
    return record | {"base": base}


def _locate(source: str | os.PathLike, revision: str | None) -> pathlib.Path:
    """Where a source lies, fetched from the Hub if it is a name there; it need not exist."""
    return fetch_model(str(source), revision) if is_hub_name(source) else pathlib.Path(source)


def find_folder(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path | None:
    """The Hugging Face folder that the weights of a source come from, through a provider's folder too; None for GGUF.

    Raises:
        UserError: as `load_model`.
    """
    path = _locate(source, revision)
    if (path / PROVIDER_FILE).is_file():
        record = read_provider(path)
        return find_folder(record["base"], record.get("revision"))
    return path if path.is_dir() else None


def _load_aligned(folder: pathlib.Path, dtype: str | None, mesh: Mesh | None, cache) -> Model:
    record = read_provider(folder)
    dtype, revision, wanted = dtype or record["dtype"], record.get("revision"), record["fingerprint"]
    template = record["template"]
    raw = load_model(record["base"], template=template, dtype=dtype, mesh=mesh, revision=revision, cache=cache)
    model = raw
    if record.get("align"):
        adapter = load_adapter(folder / record["align"], raw.params, fingerprint=raw.fingerprint)
        model = fold_adapter(raw, adapter, f"{raw.name}-aligned")
    if dtype == record["dtype"] and model.fingerprint != wanted:
        raise UserError(
            f"{folder / PROVIDER_FILE}: the aligned base is {model.fingerprint[:12]}, recorded was {wanted[:12]}: "
            "make it again"
        )
    return model
