"""The mesh, and the one table that says how every array of the project lies on it.

Each leaf is found by the last parts of its path, which name its logical axes; each logical axis goes to mesh axes.
Optimizer moments mirror the adapters' paths, so the same rows serve them.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from br_jax.core.errors import UserError

# Logical axis -> mesh axes; any other axis is whole on every device. Only this table changes when a layout is tried.
RULES = {
    "batch": ("data", "fsdp"),
    "users": ("data", "fsdp"),  # of a pool: whoever has a user's rows has its adapter, whole but for `tensor`
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "ffw": ("tensor",),
}

CACHE = {
    "k": ("layers", "batch", "kv", "head", "length"),
    "v": ("layers", "batch", "kv", "length", "head"),
}
_PROJECTIONS = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv"),
    "v": ("embed", "kv"),
    "o": ("heads", "embed"),
    "gate": ("embed", "ffw"),
    "up": ("embed", "ffw"),
    "down": ("ffw", "embed"),
}

# Path suffix -> logical axes.
LOGICAL_AXES = {
    "embed/embedding": ("vocab", "embed"),
    "head/kernel": ("embed", "vocab"),
    "final_norm/scale": ("norm",),
    **{f"{name}_norm/scale": ("layers", "norm") for name in ("attn", "attn_post", "mlp", "mlp_post", "q", "k")},
    **{f"{name}/kernel": ("layers", *axes) for name, axes in _PROJECTIONS.items()},
    **{f"{name}/bias": ("layers", fan_out) for name, (_, fan_out) in _PROJECTIONS.items()},
    **{f"{name}/a": ("layers", fan_in, "rank") for name, (fan_in, _) in _PROJECTIONS.items()},
    **{f"{name}/b": ("layers", "rank", fan_out) for name, (_, fan_out) in _PROJECTIONS.items()},
    **CACHE,
    **dict.fromkeys(("lengths", "token", "ids", "piece"), ("batch",)),
    **dict.fromkeys(("step", "count", "loss", "restart", "due"), ("users",)),
    **dict.fromkeys(("learning_rate", "weight_decay", "clip_norm", "scale", "progress"), ("users",)),
    **dict.fromkeys(("tokens", "targets", "weights", "positions", "segment_ids"), ("batch", "length")),
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with axes data, fsdp, tensor; one size may be -1 and takes the devices that are left.

    Raises:
        UserError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        fixed = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // fixed if fixed else 0
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} device(s): "
            "make the sizes multiply to that number, or set one of them to -1"
        )
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def platform(mesh: Mesh) -> str:
    """ "tpu", "gpu" or "cpu": the platform of the mesh's devices, which may be no devices of this process."""
    return mesh.devices.flat[0].platform


def batch_parts(mesh: Mesh) -> int:
    """In how many parts the mesh splits a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def whole_batch(rows: int, mesh: Mesh | None) -> int:
    """At least so many rows, so that the mesh divides them; None is one device."""
    parts = 1 if mesh is None else batch_parts(mesh)
    return -(-rows // parts) * parts


def leaf_name(path) -> str:
    """A pytree key path as "layers/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of the leaf with this path; scalars and keys have none."""
    parts = name.split("/")
    if ndim == 0 or parts[-1] == "key":
        return (None,) * ndim
    axes = LOGICAL_AXES.get("/".join(parts[-2:])) or LOGICAL_AXES.get(parts[-1], ())
    if "layers" in axes and len(axes) == ndim + 1:
        axes = axes[1:]  # of one layer by itself
    if "rank" in axes and len(axes) == ndim - 1 and "lora_trainable" in parts:
        axes = (axes[0], "users", *(None if axis == "embed" else axis for axis in axes[1:]))
    elif "rank" in axes and len(axes) == ndim - 1:
        axes = (axes[0], None, *axes[1:])  # of several adapters side by side
    if len(axes) == ndim:
        return axes
    raise UserError(
        f"no sharding rule for leaf {name} with {ndim} axes: add its path to LOGICAL_AXES in br_jax/core/mesh.py"
    )


def shardings(tree, mesh: Mesh):
    """The NamedSharding of every leaf of a (possibly abstract) pytree, written as XLA writes those of its results.

    That is without mesh axes of size 1, and no longer than needed: what a program gives back, it takes without being
    compiled again.

    Raises:
        UserError: an unmatched leaf, or a dimension that its mesh axes do not divide.
    """

    def one(path, leaf):
        name = leaf_name(path)
        spec = []
        for axis, size in zip(logical_axes(name, np.ndim(leaf)), np.shape(leaf), strict=True):
            names = RULES.get(axis, ())
            parts = math.prod(mesh.shape[n] for n in names)
            if size % parts:
                raise UserError(
                    f"leaf {name}: axis {axis} of size {size} cannot be split in {parts} "
                    f"(mesh axes {', '.join(names)}): choose another mesh"
                )
            spec.append(tuple(n for n in names if mesh.shape[n] > 1))
        while spec and not spec[-1]:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def mesh_of(tree) -> Mesh | None:
    """The mesh that a pytree's arrays lie on; None where one device holds them."""
    found = {leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(leaf.sharding, NamedSharding)}
    return next((mesh for mesh in found if mesh.size > 1), None)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of `jax.set_mesh`, or None outside of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def partition(*axes: str | None) -> PartitionSpec:
    """The table's PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def constrain(x, *axes: str | None):
    """Keeps an activation laid out as the table says, where a mesh is set."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, partition(*axes))


def gather(weight, name: str):
    """A layer's matrix whole along `embed`, where a mesh is set: fetched once from all chips, for all its products."""
    axes = logical_axes(name, weight.ndim)
    return constrain(weight, *(None if axis == "embed" else axis for axis in axes))


def constrain_tree(tree):
    """Keeps a pytree laid out as the table says, where a mesh is set."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *logical_axes(leaf_name(path), x.ndim)), tree)


def abstract(tree, mesh: Mesh):
    """Shapes, dtypes and, by the table, places of a pytree, real or abstract."""
    places = shardings(tree, mesh)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, places)


def shard(tree, mesh: Mesh | None):
    """Puts a pytree on the mesh by the table; without a mesh it stays as it is.

    Each leaf lies on the mesh already, or every process holds the same whole array, and sends its own parts.
    """
    if mesh is None:
        return tree

    def one(leaf, where):
        if where.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, where)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree, shardings(tree, mesh))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process' devices hold, ascending: [n] int.

    They need not be neighbors, and processes that split no batch axis hold the same ones.
    """
    where = shardings({"tokens": np.broadcast_to(np.int32(0), (batch_size, 1))}, mesh)["tokens"]
    mine = np.zeros(batch_size, bool)
    for rows, _ in where.addressable_devices_indices_map((batch_size, 1)).values():
        mine[rows] = True
    return np.flatnonzero(mine)
