"""Between a checkpoint's tensors ([out, in], one name a layer) and our params ([L, in, out], scanned)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from br_jax.errors import UserError
from br_jax.models.decoder import abstract_params
from br_jax.models.spec import ModelSpec
from br_jax.progress import progress
from br_jax.sharding import shardings


class Stored(NamedTuple):
    """A tensor of a checkpoint, before it is read."""

    shape: tuple[int, ...]  # as stored
    file: str  # which holds it, for messages
    open: Callable[[], Any]  # gives an object whose slices are numpy arrays, which is let go of after use


class Unstacked(NamedTuple):
    """A tensor to be written: its size, and a function that fetches it."""

    nbytes: int
    fetch: Callable[[], np.ndarray]


def load_params(
    spec: ModelSpec,
    names: Mapping[str, str],
    tensors: Mapping[str, Stored],
    where: str,
    dtype,
    mesh: Mesh | None = None,
) -> dict:
    """Reads a checkpoint's tensors into the params tree, checking that each one is used once, fits and is finite.

    They come one by one, each device's part straight to the device that holds it: beside the params, the host holds
    two tensors at most. What a process' devices do not hold is not read.

    Args:
        names: checkpoint name of each params path; "{}" in a name stands for the layer.
        where: the checkpoint, for messages.
        mesh: where to, laid out by `sharding`'s table; None is JAX's default device.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape than the spec says, or holds NaN or infinity.
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
            params[path] = _load_leaf(path, leaf, {key: tensors[key] for key in keys[path]}, places[path], bar)
    return unflatten_dict(params, sep="/")


def unstack_tensors(spec: ModelSpec, names: Mapping[str, str], params: dict) -> dict[str, Unstacked]:
    """The exact inverse of `load_params`, a tensor at a time: contiguous, in the params' dtype, kernels [out, in]."""
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        keys = _per_layer(names[path], spec.num_layers)
        for i, key in enumerate(keys):
            index = i if "{}" in names[path] else ...
            fetch = functools.partial(_fetch, leaf, index, turned=_is_kernel(path))
            tensors[key] = Unstacked(leaf.nbytes // len(keys), fetch)
    return tensors


def _fetch(leaf, index, turned: bool) -> np.ndarray:
    tensor = np.asarray(leaf[index])
    return np.ascontiguousarray(tensor.T if turned else tensor)


def _load_leaf(path: str, leaf: jax.ShapeDtypeStruct, tensors: Mapping[str, Stored], place, bar) -> jax.Array:
    """One param: its layers' tensors, each turned, cast and written into place while the next one is read."""
    stacked, turned = path.startswith("layers/"), _is_kernel(path)
    shape = leaf.shape[1:] if stacked else leaf.shape
    fitting = shape[::-1] if turned else shape
    buffer, running = _empty(leaf.shape, leaf.dtype, place) if stacked else None, None
    for layer, (key, tensor) in enumerate(tensors.items()):
        if tensor.shape != fitting:
            raise UserError(f"{tensor.file}: tensor {key} has shape {tensor.shape}, the sizes say {fitting}")
        part = _read(tensor, place, stacked, turned)
        _require_finite(running)
        buffer, finite = _write(buffer, part, layer, turned=turned, dtype=leaf.dtype, place=place)
        running = tensor.file, key, finite
        bar.update()
    _require_finite(running)
    return buffer


def _require_finite(running: tuple[str, str, jax.Array] | None) -> None:
    """Waits for a write, so that no more than two tensors are on their way."""
    if running is not None and not bool(running[2]):
        raise UserError(f"{running[0]}: tensor {running[1]} holds NaN or infinity: the weights are damaged")


def _read(tensor: Stored, place: NamedSharding | None, stacked: bool, turned: bool) -> jax.Array:
    """The tensor as stored, each device's part of it on the device that will hold it."""
    opened = tensor.open()
    if place is None:
        return jnp.asarray(opened[(slice(None),) * len(tensor.shape)])
    spec = (*place.spec, *[None] * (len(tensor.shape) + stacked - len(place.spec)))
    axes = spec[1:] if stacked else spec
    as_stored = NamedSharding(place.mesh, PartitionSpec(*(axes[::-1] if turned else axes)))
    read = functools.cache(lambda bounds: opened[tuple(slice(*each) for each in bounds)])  # copies read it once

    def part(index):
        return read(tuple(each.indices(size)[:2] for each, size in zip(index, tensor.shape, strict=True)))

    return jax.make_array_from_callback(tensor.shape, as_stored, part)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype, place):
    zeros = jnp.zeros(shape, dtype)
    return zeros if place is None else jax.lax.with_sharding_constraint(zeros, place)


@functools.partial(jax.jit, static_argnames=("turned", "dtype", "place"), donate_argnames=("buffer",))
def _write(buffer, part, layer, *, turned: bool, dtype, place):
    """(the buffer with a layer written, or the tensor itself where there is no buffer; whether all of it is finite)."""
    finite = jnp.isfinite(part).all()
    value = (part.T if turned else part).astype(dtype)
    if buffer is not None:
        value = jax.lax.dynamic_update_index_in_dim(buffer, value, layer, 0)
    return value if place is None else jax.lax.with_sharding_constraint(value, place), finite


def _per_layer(name: str, layers: int) -> list[str]:
    return [name.format(layer) for layer in range(layers)] if "{}" in name else [name]


def _is_kernel(path: str) -> bool:
    # Kernels are [in, out] here and [out, in] in every checkpoint; embeddings are [V, D] in both.
    return path.endswith("/kernel")
