"""LoRA adapters as plain pytrees over a frozen base: make, stack, scale, detach, fold, and what each must be.

L layers, I input width, O output width, R rank: a kernel is [L, I, O], and its delta is `scale * a @ b`.
"""

import functools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from br_jax.core import records
from br_jax.core.bounds import ALPHA, RANK, require
from br_jax.core.errors import UserError, near_names

DEFAULT_TARGETS = ("q", "v", "gate", "up", "down")
ROLES = ("align", "buffer", "reinforce", "user")  # the stages that make adapters
UNKNOWN = "unknown"  # the role of an adapter that neither its file nor its loader has said what it is

Shape = tuple[int, int, int]
Weights = dict[str, dict[str, Array]]


@flax.struct.dataclass
class Adapter:
    """A low-rank change of some kernels of the base."""

    weights: Weights  # path of the base kernel (without "/kernel") -> {"a": f32[L, I, R], "b": f32[L, R, O]}
    scale: Float[Array, ""]  # f32, lora_alpha / rank
    # Where it came from: one of `ROLES`, or the sorted union of several; or `UNKNOWN`.
    roles: tuple[str, ...] = flax.struct.field(pytree_node=False)
    # Fingerprint of the model that it was made for; "" where nobody has said.
    base: str = flax.struct.field(pytree_node=False, default="")


def kernel_shapes(params: Mapping[str, Any]) -> dict[str, Shape]:
    """(L, I, O) of each scanned kernel by its path without "/kernel"; the tree may be abstract."""
    leaves = flatten_dict(dict(params), sep="/").items()
    kernels = {path: leaf.shape for path, leaf in leaves if path.endswith("/kernel") and len(leaf.shape) == 3}
    return {path.removesuffix("/kernel"): shape for path, shape in kernels.items()}


def target_shapes(params: Mapping[str, Any], targets: Sequence[str] = DEFAULT_TARGETS) -> dict[str, Shape]:
    """`kernel_shapes` of the paths that end in one of the targets; a `UserError` for a target that names none."""
    shapes = kernel_shapes(params)
    names = {path.rsplit("/", 1)[-1] for path in shapes}
    for target in targets:
        if target not in names:
            raise UserError(f"adapter target {target!r} is no kernel of this model; {near_names(target, names)}")
    return {path: shape for path, shape in shapes.items() if path.rsplit("/", 1)[-1] in targets}


def init(key: Array, shapes: Mapping[str, Shape], rank: int, alpha: float, role: str, base: str = "") -> Adapter:
    """Draws a new adapter as PEFT does: `a` uniform in +-1/sqrt(I), `b` zero, so its delta is zero.

    Each path's draw is from the typed `key` and its own name, whatever the others are. The scale is alpha / rank; a
    rank or alpha out of bounds is a `UserError`.
    """
    require(f"adapter {role!r}: rank", rank, RANK)
    require(f"adapter {role!r}: alpha", alpha, ALPHA)
    return Adapter(_draw(key, tuple(shapes.items()), rank), jax.device_put(np.float32(alpha / rank)), (role,), base)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Array, shapes: tuple[tuple[str, Shape], ...], rank: int) -> Weights:
    weights = {}
    for path, (layers, fan_in, fan_out) in shapes:
        # crc32 and not hash(): the latter is salted anew in each process
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(path_key, (layers, fan_in, rank), jnp.float32, -bound, bound)
        weights[path] = {"a": a, "b": jnp.zeros((layers, rank, fan_out), jnp.float32)}
    return weights


def stack(adapters: Sequence[Adapter] | Mapping[str, Adapter]) -> Adapter:
    """Joins adapters along the rank axis: the result's delta is the exact sum of theirs.

    Ranks, scales and targets may differ. The result's scale is 1 (each part's goes into its `b`), its roles are the
    sorted union, its base is theirs ("" where one does not say). A `UserError` where they are of different bases.
    """
    parts = list(adapters.values()) if isinstance(adapters, Mapping) else list(adapters)
    require_same_kernels(parts)
    weights = _join([(part.weights, part.scale) for part in parts])
    roles, bases = {role for part in parts for role in part.roles}, {part.base for part in parts}
    if len(bases - {""}) > 1:
        raise UserError(f"adapters of the bases {' and '.join(sorted(base[:12] for base in bases - {''}))} do not mix")
    return Adapter(weights, jnp.float32(1), tuple(sorted(roles)), "" if "" in bases else next(iter(bases), ""))


@jax.jit
def _join(parts: list[tuple[Weights, Array]]) -> Weights:
    joined = {}
    for path in sorted({path for weights, _ in parts for path in weights}):
        held = [(weights[path], scale) for weights, scale in parts if path in weights]
        a, b = [pair["a"] for pair, _ in held], [scale * pair["b"] for pair, scale in held]
        joined[path] = {"a": jnp.concatenate(a, -1), "b": jnp.concatenate(b, -2)}
    return joined


def pad_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same delta at a larger rank: zeros are added behind each `a` and `b`."""

    def pad(array, axis: int):
        more = [(0, rank - array.shape[axis] if i == axis else 0) for i in range(3)]
        return (np if isinstance(array, np.ndarray) else jnp).pad(array, more) if more[axis][1] else array

    weights = {path: {"a": pad(pair["a"], 2), "b": pad(pair["b"], 1)} for path, pair in adapter.weights.items()}
    return adapter.replace(weights=weights)


def scaled(adapter: Adapter, factor: float | Float[Array, ""]) -> Adapter:
    """Multiplies an adapter's delta by a factor; the weights stay the same arrays."""
    return adapter.replace(scale=adapter.scale * factor)


def detach(adapters: Mapping[str, Adapter], name: str = "buffer") -> dict[str, Adapter]:
    """Takes one adapter out of the named dict of those in use: the surgery after training.

    The base is never written, so leaving an adapter out undoes it to the bit. The dict is a new one, of the same other
    adapters in the same order.

    Raises:
        UserError: no adapter has this name.
    """
    if name not in adapters:
        raise UserError(f"no adapter named {name!r} to detach; {near_names(name, adapters)}")
    return {other: adapter for other, adapter in adapters.items() if other != name}


def fold(params: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Adds an adapter's delta into a copy of the base's tree; a `UserError` where it does not fit, see `validate`.

    The adapted kernels are new arrays (added in f32, rounded once to their dtype), all other leaves the same objects.
    """
    validate(adapter, params)
    flat = flatten_dict(dict(params), sep="/")
    kernels = {path: flat[f"{path}/kernel"] for path in adapter.weights}
    folded = _fold_kernels(kernels, adapter.weights, adapter.scale)
    return unflatten_dict(flat | {f"{path}/kernel": kernel for path, kernel in folded.items()}, sep="/")


@jax.jit
def _fold_kernels(kernels: dict[str, Float[Array, "L I O"]], weights: Weights, scale) -> dict:
    """A layer at a time, so that the dense f32 delta never exists for all layers at once."""

    def fold_layer(layer):
        kernel, a, b = layer
        update = scale * jnp.matmul(a, b, precision="highest")
        return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)

    return {
        path: jax.lax.map(fold_layer, (kernel, weights[path]["a"], weights[path]["b"]))
        for path, kernel in kernels.items()
    }


def unchanged_share(params: Mapping[str, Any], folded: Mapping[str, Any], adapter: Adapter) -> float:
    """What rounding to the base's dtype swallowed: the share of all adapted entries that `fold` left as they were."""
    before, after = (flatten_dict(dict(tree), sep="/") for tree in (params, folded))
    kernels = [f"{path}/kernel" for path in adapter.weights]
    unchanged = sum(float(jnp.mean(before[path] == after[path])) * before[path].size for path in kernels)
    return unchanged / sum(before[path].size for path in kernels)


def collection(adapter: Adapter) -> dict[str, Any]:
    """The Flax variable collection "lora", which mirrors `params`: {"layers": {"attn": {"q": {"a", "b"}}}}, scaled."""
    return unflatten_dict(_join([(adapter.weights, adapter.scale)]), sep="/")


def fingerprint(adapter: Adapter) -> str:
    """SHA-256 of an adapter's numbers."""
    return records.fingerprint({"weights": adapter.weights, "scale": adapter.scale})


# Each of these raises a `UserError` that begins with the place where an adapter goes.


def require_adapter(adapter: Any, place: object) -> None:
    """Refuses anything but an `Adapter`."""
    if not isinstance(adapter, Adapter):
        raise UserError(f"{place}: needs an Adapter, got {type(adapter).__name__}: br.load_adapter reads one")


def validate(adapter: Adapter, params: Mapping[str, Any]) -> None:
    """Refuses an adapter that does not fit a base, whose tree may be abstract, or holds a number that is not finite."""
    require_adapter(adapter, "adapter")
    shapes = kernel_shapes(params)
    for path, pair in adapter.weights.items():
        if path not in shapes:
            raise UserError(f"adapter path {path!r} is no kernel of this model; {near_names(path, shapes)}")
        layers, fan_in, fan_out = shapes[path]
        a, b = pair["a"].shape, pair["b"].shape
        if a[:-1] != (layers, fan_in) or b != (layers, a[-1], fan_out):
            raise UserError(
                f"adapter path {path!r}: a {a} and b {b} do not fit the model's kernel {shapes[path]}; was it made for "
                "another model?"
            )
    require_finite(adapter)


def require_finite(adapter: Adapter) -> None:
    """Names the first leaf with a NaN or an infinity."""
    leaves = {"scale": adapter.scale} | flatten_dict(adapter.weights, sep="/")
    for name, leaf in jax.device_get(leaves).items():
        if not np.isfinite(leaf).all():
            raise UserError(f"adapter {'+'.join(adapter.roles)}: {name!r} holds NaN or infinity; train it again")


def require_roles(place: object, roles: Iterable[str]) -> None:
    """Refuses no roles at all, and any but `ROLES` and `UNKNOWN`."""
    if not roles or not set(roles) <= {*ROLES, UNKNOWN}:
        named = ", ".join(map(ascii, roles)) or "none"
        raise UserError(f"{place}: its roles are {named}, but must be among {', '.join(ROLES)}: save the adapter again")


def refuse_buffer(place: object, roles: Iterable[str]) -> None:
    """Refuses what must not be merged, written or handed on: a Buffer, or what nobody says what it is."""
    require_roles(place, roles)
    if "buffer" in roles:
        raise UserError(
            f"{place}: refused, for the adapter holds a buffer (roles {'+'.join(roles)}): it undoes the model's "
            "alignment; detach it, or keep it in the provider's folder"
        )
    if UNKNOWN in roles:
        raise UserError(
            f"{place}: refused, for nothing says what this adapter is: if you know that it is a user's, load it with "
            'the role "user"'
        )


def require_base(adapter: Adapter, base: str, place: object) -> None:
    """Refuses an adapter that says that it was made for another base."""
    if adapter.base and adapter.base != base:
        raise UserError(
            f"{place}: the adapter {'+'.join(adapter.roles)} was made for the base {adapter.base[:12]}, but this base "
            f"is {base[:12]}: use the model that it was trained on"
        )


def require_same_kernels(adapters: Sequence[Adapter]) -> None:
    """Refuses adapters of which two share a path, but were made for kernels of different shapes."""
    shapes = {}  # path -> (L, I, O) -> whose
    for adapter in adapters:
        for path, pair in adapter.weights.items():
            shape = *pair["a"].shape[:-1], pair["b"].shape[-1]
            shapes.setdefault(path, {})[shape] = "+".join(adapter.roles)
    for path in sorted(shapes):
        if len(shapes[path]) > 1:
            owners = ", ".join(f"{role} {shape}" for shape, role in shapes[path].items())
            raise UserError(f"adapters disagree on the kernel {path!r}: {owners}; they were made for different models")
