"""Converted weights on disk, so that a model is dequantized, turned and cast once.

An entry is an Orbax checkpoint of the params, named by a SHA-256 of what they were made from: a changed file is another
entry. Restoring reads each device's part alone, onto whatever mesh there is.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from br_jax.distributed import agree
from br_jax.errors import UserError
from br_jax.models.decoder import abstract_params
from br_jax.models.spec import ModelSpec
from br_jax.sharding import shardings

_FORMAT = "br_jax params 1"  # another for another tree or layout
_CHUNK = 1 << 24


def content_hash(path: pathlib.Path, dtype: str) -> str:
    """SHA-256 of a model's weights and config files, and of the dtype that they are converted to."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    digest = hashlib.sha256(f"{_FORMAT} {dtype}".encode())
    for file in files:
        digest.update(f" {file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def cached_params(
    cache: str | os.PathLike | None,
    path: pathlib.Path,
    spec: ModelSpec,
    dtype,
    mesh: Mesh | None,
    load: Callable[[], dict],
) -> dict:
    """The params from the cache, or from `load` and then into the cache.

    Args:
        cache: its folder, made if absent; None goes straight to `load`.
        path: the GGUF file or Hugging Face folder.
        spec, dtype, mesh: as in `layout.load_params`.
        load: reads and converts.

    Raises:
        UserError: an entry cannot be read or written.
    """
    if cache is None:
        return load()
    entry = pathlib.Path(cache).absolute() / content_hash(path, str(dtype))
    try:
        if not agree(entry.exists()):
            params = load()
            ocp.save(entry, params)
            return params
        tree = abstract_params(spec, dtype)
        if mesh is None:
            return jax.tree.map(jnp.asarray, ocp.load(entry, jax.tree.map(_on_host, tree)))
        places = shardings(tree, mesh)
        laid = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
        return ocp.load(entry, laid)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{entry}: the cache entry cannot be used ({str(error).splitlines()[0]}): delete it or free space"
        ) from error


def _on_host(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """To Orbax, a leaf to be restored to the host's memory; takes none itself."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
