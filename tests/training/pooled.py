"""Meshes and adapters of the tests of a pool."""

import functools
import math

import jax
import numpy as np

from br_jax.adapters import lora
from br_jax.core.mesh import make_mesh


def mesh_of(*sizes):
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


ONE = functools.cache(lambda: mesh_of(1, 1, 1))


def distance(found, expected):
    """The largest relative distance of a leaf."""
    pairs = zip(jax.tree.leaves(found.weights), jax.tree.leaves(expected.weights), strict=True)
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def bits_of(outcomes):
    return {o.name: lora.fingerprint(o.adapter) for o in outcomes if o.adapter}
