"""The QR merge at Llama-3-8B's shapes, ours in low rank against the formula with dense matrices in torch."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import HERE, Setup, require_torch
from benchmarks.pairing import Contender
from benchmarks.report import Case
from benchmarks.torch_merge import random_factors
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.core.errors import UserError

# Llama-3-8B's adapted kernels: (L, in, out).
SHAPES = {
    "layers/attn/q": (32, 4096, 4096),
    "layers/attn/v": (32, 4096, 1024),
    "layers/mlp/gate": (32, 4096, 14336),
    "layers/mlp/up": (32, 4096, 14336),
    "layers/mlp/down": (32, 14336, 4096),
}
RANK, SCALE, A, WEIGHT, TAU = 32, 2.0, 0.1, 0.5, 0.01
SAMPLE = "layers/attn/v"
DENSE_LAYERS = 2  # of 32, a unit: the rate is what is compared, and every layer takes as long as the next


def cases(setup: Setup, shapes: dict = SHAPES, dense_layers: int = DENSE_LAYERS) -> list[Case]:
    """All matrices of two adapters of rank 32."""
    require_torch("merge")
    settings = {"shapes": shapes, "rank": RANK, "scale": SCALE, "a": A, "weight": WEIGHT, "tau": TAU, "sample": SAMPLE}
    dense = {**settings, "layers": dense_layers, "threads": setup.threads}
    layers = shapes[SAMPLE][0]
    return [
        Case(
            "merge",
            f"QR merge of two adapters, f32, r {RANK}, {layers} layers of Llama-3-8B's q, v, gate, up, down; ours "
            f"makes an adapter; dense makes the matrices one at a time in torch on {setup.threads} threads, "
            f"{dense_layers} of {layers} layers in a unit",
            [
                Contender("br_jax, low rank", HERE / "merge.py", "merge", settings),
                Contender("torch, dense", HERE / "torch_merge.py", "merge", dense),
            ],
            "matrix",
            same_matrices,
        )
    ]


def same_matrices(outcomes: dict[str, list[np.ndarray]]) -> list[str]:
    """Says how far the sample matrices are apart, relative to the largest entry.

    Raises:
        UserError: farther than 1e-5.
    """
    ours, dense = (units[0] for units in outcomes.values())
    error = float(np.abs(ours - dense).max() / np.abs(dense).max())
    if not error <= 1e-5:
        raise UserError(f"benchmark merge: {SAMPLE}, layer 0, differs by {error:.1e} of its largest entry")
    return [f"{SAMPLE}, layer 0, {ours.shape}: differs by {error:.1e} of its largest entry"]


def merge(shapes: dict, rank: int, scale: float, a: float, weight: float, tau: float, sample: str):
    """A contender's work: `qr_merge` of everything; its outcome the dense change of one matrix, [in, out]."""

    def load(seed: int, role: str) -> Adapter:
        weights = {path: random_factors(path, seed, *shape, rank) for path, shape in shapes.items()}
        return Adapter(jax.tree.map(jnp.asarray, weights), jnp.float32(scale), (role,))

    user, reinforce = load(0, "user"), load(1, "reinforce")

    def unit(index: int):
        merged = qr_merge(user, reinforce, MergeConfig(a, weight, tau))
        jax.block_until_ready(merged.weights)
        pair = {name: array[0] for name, array in merged.weights[sample].items()}
        return len(shapes) * shapes[sample][0], lambda: np.asarray(
            jnp.matmul(pair["a"], pair["b"], precision="highest")
        )

    return unit
