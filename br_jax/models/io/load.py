"""One door for models: a GGUF file, a Hugging Face folder, or a model's name on the Hub."""

import os
import pathlib
from collections.abc import Sequence

from jax.sharding import Mesh

from br_jax.core.errors import UserError
from br_jax.core.io import reading
from br_jax.models.io.gguf import read_gguf, read_gguf_spec
from br_jax.models.io.hf import read_hf, read_hf_spec
from br_jax.models.io.hub import FILES, fetch_model, is_hub_name
from br_jax.models.model import Model, make_model
from br_jax.models.precision import resolve_precision
from br_jax.models.spec import ModelSpec


def read_model(
    source: str | os.PathLike,
    *,
    template: str = "chat",
    dtype: str = "float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    matmul_precision: str = "float32",
) -> Model:
    """Reads a frozen base as its makers distribute it; arguments and errors as in `provider.load_model`."""
    require_dtype(dtype)
    precision = resolve_precision(matmul_precision, dtype)
    path = find_source(source, revision)
    read = read_hf if path.is_dir() else read_gguf
    spec, params, tokenizer, stops = read(path, dtype, mesh)
    name = pathlib.Path(source).name.removesuffix(".gguf")
    return make_model(spec, params, tokenizer, name, template, stops, precision)


def require_dtype(dtype: str) -> None:
    """Raises a `UserError` for a dtype that params cannot have."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: use float32 or bfloat16")


def read_spec(source: str | os.PathLike, revision: str | None = None) -> ModelSpec:
    """The sizes of the model at a source, without its weights; raises as `read_model`."""
    path = find_source(source, revision, ("config.json",))
    return read_hf_spec(path) if path.is_dir() else read_gguf_spec(path)


def find_source(source: str | os.PathLike, revision: str | None = None, files: Sequence[str] = FILES) -> pathlib.Path:
    """Where a source lies, these of its files fetched from the Hub if it is a name there; a `UserError` if nowhere."""
    path = fetch_model(str(source), revision, files) if is_hub_name(source) else pathlib.Path(source)
    with reading(path):
        found = path.exists()
    if not found:
        raise UserError(
            f"{path}: no such model: give a GGUF file, a Hugging Face folder, a model's name on the Hub or a "
            "provider's folder"
        )
    return path
