"""Models by name: those of the Hugging Face Hub, by huggingface_hub (its cache, its offline mode), and the tiny
one that comes with br_jax.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from importlib import resources

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from br_jax.core.errors import UserError, one_line

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The raw model of configs/demo.py, made by that config's ":scratch": 0.4 million params, nothing to download.
_SHIPPED = {"br_jax/tiny": ("br_jax.organism", "tiny")}
# What a model is made of here. Pickled weights are never fetched, nor weights in another layout ("original/").
FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "USE_POLICY*")
# What can go wrong, the narrower errors first.
_WRONG = {
    GatedRepoError: "gated by its makers: ask for access at https://huggingface.co/{name}, then run `hf auth login`",
    RevisionNotFoundError: "the model has no such revision: see https://huggingface.co/{name}/tree/main",
    RepositoryNotFoundError: "neither a path nor a model on the Hub (or private: run `hf auth login`): check the name",
    Exception: "no path here, not in the cache, and the Hub cannot be reached ({error}): go online, "
    "unset HF_HUB_OFFLINE, or give a local folder",
}


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source is a name, as "Qwen/Qwen3-4B" or "br_jax/tiny"; what exists as a path, or should, is none."""
    name = str(source)
    return _NAME.fullmatch(name) is not None and not name.endswith(".gguf") and not os.path.exists(source)


def fetch_model(name: str, revision: str | None = None, files: Sequence[str] = FILES) -> pathlib.Path:
    """The folder of a model's config, safetensors and tokenizer, fetched into huggingface_hub's cache if not there.

    A name is "organization/model", a revision a branch, tag or commit; None is the main branch.

    Raises:
        UserError: there is no such model or revision, it is gated, or the Hub cannot be reached.
    """
    if name in _SHIPPED:
        package, folder = _SHIPPED[name]
        return pathlib.Path(str(resources.files(package) / folder))
    at = f"{name}@{revision}" if revision else name
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=[*files], ignore_patterns=["*/*"])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        told = next(told for kind, told in _WRONG.items() if isinstance(error, kind))
        raise UserError(f"{at}: {told.format(name=name, error=one_line(error))}") from error
    return pathlib.Path(found)
