"""One door for models: a GGUF file, a Hugging Face folder, a model's name on the Hub, or the one that comes with us.

huggingface_hub fetches what has a name, into its cache; its offline mode holds.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from importlib import resources

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from jax.sharding import Mesh

from br_jax.core.errors import UserError, near_names, one_line
from br_jax.data.templates import TEMPLATES
from br_jax.models.io.gguf import read_gguf, read_gguf_spec
from br_jax.models.io.hf import read_hf, read_hf_spec
from br_jax.models.kernels import resolve_precision
from br_jax.models.model import Model, make_model
from br_jax.models.spec import ModelSpec

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The raw model of configs/demo.py, made by that config's ":scratch": 0.4 million params, nothing to download.
_SHIPPED = {"br_jax/tiny": ("br_jax.organism", "tiny")}
# What a model is made of here. Pickled weights are never fetched, nor weights in another layout ("original/").
FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "USE_POLICY*")
# What can go wrong on the Hub, the narrower errors first.
_WRONG = {
    hub_errors.GatedRepoError: "gated by its makers: ask for access at https://huggingface.co/{name}, then run "
    "`hf auth login`",
    hub_errors.RevisionNotFoundError: "the model has no such revision: see https://huggingface.co/{name}/tree/main",
    hub_errors.RepositoryNotFoundError: "neither a path nor a model on the Hub (or private: run `hf auth login`): "
    "check the name",
    Exception: "no path here, not in the cache, and the Hub cannot be reached ({error}): go online, "
    "unset HF_HUB_OFFLINE, or give a local folder",
}


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
    if template not in TEMPLATES:
        raise UserError(f"template {template!r}; {near_names(template, TEMPLATES)}")
    require_dtype(dtype)
    precision = resolve_precision(matmul_precision, dtype)
    path = find_source(source, revision)
    spec, params, tokenizer, stops = (read_hf if path.is_dir() else read_gguf)(path, dtype, mesh)
    name = pathlib.Path(source).name.removesuffix(".gguf")
    return make_model(spec, params, tokenizer, name, template, stops, precision)


def require_dtype(dtype: str) -> None:
    """Raises a `UserError` for a dtype that params cannot have."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: use float32 or bfloat16")


def read_spec(source: str | os.PathLike, revision: str | None = None) -> ModelSpec:
    """The sizes of the model at a source, without its weights."""
    path = find_source(source, revision, ("config.json",))
    return read_hf_spec(path) if path.is_dir() else read_gguf_spec(path)


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source is a name, as "Qwen/Qwen3-4B" or "br_jax/tiny"; what exists as a path, or should, is none."""
    name = str(source)
    return _NAME.fullmatch(name) is not None and not name.endswith(".gguf") and not os.path.exists(source)


def find_source(source: str | os.PathLike, revision: str | None = None, files: Sequence[str] = FILES) -> pathlib.Path:
    """Where a source lies, these of its files fetched from the Hub if it is a name there.

    Of such a name, `revision` is a branch, tag or commit; None is the main branch.
    """
    name = str(source)
    if not isinstance(source, str | os.PathLike) or "\0" in name:
        raise UserError(f"{one_line(repr(source))}: is neither a path nor a model's name")
    if not is_hub_name(source):
        if not pathlib.Path(source).exists():
            raise UserError(
                f"{source}: no such model: give a GGUF file, a Hugging Face folder, a model's name on the Hub or a "
                "provider's folder"
            )
        return pathlib.Path(source)
    if name in _SHIPPED:
        package, folder = _SHIPPED[name]
        return pathlib.Path(str(resources.files(package) / folder))
    try:
        # no folder inside: another layout, or another kind of weights
        folder = snapshot_download(name, revision=revision, allow_patterns=[*files], ignore_patterns=["*/*"])
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError, OSError) as error:
        reason = next(reason for kind, reason in _WRONG.items() if isinstance(error, kind))
        at = f"{name}@{revision}" if revision else name
        raise UserError(f"{at}: {reason.format(name=name, error=one_line(error))}") from error
    return pathlib.Path(folder)
