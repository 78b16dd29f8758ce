"""Between a checkpoint's tensors ([out, in], one name a layer) and our params ([L, in, out], scanned)."""

from collections.abc import Callable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from br_jax.errors import UserError
from br_jax.models.decoder import abstract_params
from br_jax.models.spec import ModelSpec


def stack_tensors(
    spec: ModelSpec,
    names: Mapping[str, str],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    where: str,
    dtype=np.float32,
) -> dict:
    """Collects a checkpoint's tensors into the params tree, checking that each one is used once and fits.

    Tensors are loaded one by one into preallocated arrays, so the peak is the params and one tensor.

    Args:
        spec: sizes that the tensors must agree with.
        names: checkpoint name of each params path; "{}" in a name stands for the layer.
        tensors: for each name in the checkpoint, a function that loads the tensor.
        where: the checkpoint, for messages.
        dtype: dtype of the result.

    Returns:
        Nested dict of numpy arrays, the tree of `abstract_params(spec)`.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape than the spec says.
    """
    wanted = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(spec), sep="/").items()}
    expected = {name for path in wanted for name in _per_layer(names[path], spec.num_layers)}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all): download again")
    if extra := sorted(tensors.keys() - expected):
        raise UserError(
            f"{where}: unexpected tensor {extra[0]} ({len(extra)} in all): not a plain Llama model "
            f"of {spec.num_layers} layers"
        )
    stacked = {path: _stack(path, shape, names[path], tensors, where, dtype) for path, shape in wanted.items()}
    return unflatten_dict(stacked, sep="/")


def unstack_tensors(spec: ModelSpec, names: Mapping[str, str], params: dict) -> dict[str, np.ndarray]:
    """The exact inverse of `stack_tensors`.

    Args:
        spec: sizes of the model.
        names: checkpoint name of each params path; "{}" in a name stands for the layer.
        params: params tree, jax or numpy arrays.

    Returns:
        Contiguous numpy arrays by checkpoint name, in the params' dtype, kernels as [out, in].
    """
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        array = np.asarray(leaf)
        parts = array if "{}" in names[path] else [array]
        for name, part in zip(_per_layer(names[path], spec.num_layers), parts, strict=True):
            tensors[name] = np.ascontiguousarray(part.T if _is_kernel(path) else part)
    return tensors


def _stack(path, shape, name, tensors, where, dtype) -> np.ndarray:
    out = np.empty(shape, dtype)
    slots = out if "{}" in name else out[None]
    for slot, key in zip(slots, _per_layer(name, len(slots)), strict=True):
        tensor = tensors[key]()
        fitting = slot.shape[::-1] if _is_kernel(path) else slot.shape
        if tensor.shape != fitting:
            raise UserError(f"{where}: tensor {key} has shape {tensor.shape}, the sizes say {fitting}")
        slot[...] = tensor.T if _is_kernel(path) else tensor
    return out


def _per_layer(name: str, layers: int) -> list[str]:
    return [name.format(layer) for layer in range(layers)] if "{}" in name else [name]


def _is_kernel(path: str) -> bool:
    # Kernels are [in, out] here and [out, in] in every checkpoint; embeddings are [V, D] in both.
    return path.endswith("/kernel")
