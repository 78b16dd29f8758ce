"""Models by name: those of the Hugging Face Hub, by huggingface_hub's cache, progress bar and offline mode, and the tiny
one that comes with br_jax.
"""

import os
import pathlib
import re
from importlib import resources

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from br_jax.errors import UserError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The raw model of configs/demo.py, made by that config's ":scratch": 0.4 million params, nothing to download.
_SHIPPED = {"br_jax/tiny": ("br_jax.organism", "tiny")}
# What a model is made of here. Pickled weights are never fetched, nor weights in another layout ("original/").
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "USE_POLICY*")


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source is a name, as "Qwen/Qwen3-4B" or "br_jax/tiny"; what exists as a path, or should, is none."""
    name = str(source)
    return _NAME.fullmatch(name) is not None and not name.endswith(".gguf") and not os.path.exists(source)


def fetch_model(name: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a model's config, safetensors and tokenizer, fetched into huggingface_hub's cache if not there.

    Args:
        name: "organization/model".
        revision: branch, tag or commit; None is the main branch.

    Raises:
        UserError: there is no such model or revision, it is gated, or the Hub cannot be reached.
    """
    patterns = [*_FILES]
    return _fetch(
        name,
        revision,
        lambda: snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]),
    )


def fetch_config(name: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a model's config.json, and of nothing else that was not fetched before; raises as `fetch_model`."""
    return _fetch(name, revision, lambda: pathlib.Path(hf_hub_download(name, "config.json", revision=revision)).parent)


def _fetch(name: str, revision: str | None, fetch) -> pathlib.Path:
    if name in _SHIPPED:
        package, folder = _SHIPPED[name]
        return pathlib.Path(str(resources.files(package) / folder))
    at = f"{name}@{revision}" if revision else name
    try:
        return pathlib.Path(fetch())
    except GatedRepoError as error:
        raise UserError(
            f"{at}: gated by its makers: ask for access at https://huggingface.co/{name}, then run `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{at}: the model has no such revision: see https://huggingface.co/{name}/tree/main") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{at}: neither a path nor a model on the Hub (or a private one: run `hf auth login`): check the name"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{at}: no path here, not in the cache, and the Hub cannot be reached ({_line(error)}): go online, unset "
            "HF_HUB_OFFLINE, or give a local folder"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
