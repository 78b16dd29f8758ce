"""Between a checkpoint's tensors ([out, in], one name a layer) and our params ([L, in, out], scanned)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from br_jax.core.errors import UserError
from br_jax.core.mesh import shardings
from br_jax.core.progress import progress
from br_jax.models.decoder import abstract_params
from br_jax.models.spec import ModelSpec

_STRIP = 16  # rows of a kernel that are turned at a time: a line of the processor's caches of f32


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

    They come one by one: beside the params, the host holds a tensor, and of one param what goes to its devices. What a
    process' devices do not hold is not read.

    Args:
        names: checkpoint name of each params path; "{}" in a name stands for the layer.
        where: the checkpoint, for messages.
        mesh: where to, laid out by `core.mesh`'s table; None is JAX's default device.

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
            params[path] = _load_leaf(path, leaf, {key: tensors[key] for key in keys[path]}, places[path])
            bar.update(len(keys[path]))
    return unflatten_dict(params, sep="/")


def unstack_tensors(spec: ModelSpec, names: Mapping[str, str], params: dict) -> dict[str, Unstacked]:
    """The exact inverse of `load_params`, a tensor at a time: contiguous, in the params' dtype, kernels [out, in]."""

    def fetch(leaf, index, turned: bool) -> np.ndarray:
        tensor = np.asarray(leaf[index])
        return np.ascontiguousarray(tensor.T if turned else tensor)

    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        keys = _per_layer(names[path], spec.num_layers)
        for i, key in enumerate(keys):
            index = i if "{}" in names[path] else ...
            one = functools.partial(fetch, leaf, index, turned=path.endswith("/kernel"))
            tensors[key] = Unstacked(leaf.nbytes // len(keys), one)
    return tensors


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

    parts = {part: np.empty([end - start for start, end in part], leaf.dtype) for part in set(map(bounds, indices))}
    for layer, (key, tensor) in enumerate(tensors.items()):
        if tensor.shape != stored_shape:
            raise UserError(f"{tensor.file}: tensor {key} has shape {tensor.shape}, the sizes say {stored_shape}")
        opened = tensor.open()
        for part, array in parts.items():
            axes = [slice(*each) for each in (part[1:] if stacked else part)]
            values = opened[tuple(axes[::-1] if turned else axes)]
            if not np.isfinite(values).all():
                raise UserError(f"{tensor.file}: tensor {key} holds NaN or infinity: the weights are damaged")
            target = array[layer] if stacked else array
            if not turned:
                target[...] = values
                continue
            for first in range(0, len(values), _STRIP):  # numpy takes three times as long over a whole matrix
                target[:, first : first + _STRIP] = values[first : first + _STRIP].T
    if place is None:
        return jax.device_put(parts[bounds(everything)])
    return jax.make_array_from_callback(leaf.shape, place, lambda index: parts[bounds(index)])


def _per_layer(name: str, layers: int) -> list[str]:
    return [name.format(layer) for layer in range(layers)] if "{}" in name else [name]
