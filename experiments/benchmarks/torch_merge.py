"""The other side of `merge`: the paper's formula with dense matrices. Nothing of br_jax is imported here."""

import numpy as np


def random_factors(name: str, seed: int, layers: int, fan_in: int, fan_out: int, rank: int) -> dict[str, np.ndarray]:
    """{"a": f32[layers, in, rank], "b": f32[layers, rank, out]} of one kernel, the same in every process."""
    rng = np.random.default_rng([seed, *name.encode()])
    return {
        "a": rng.uniform(-1, 1, (layers, fan_in, rank)).astype(np.float32) / np.float32(fan_in**0.5),
        "b": rng.normal(size=(layers, rank, fan_out)).astype(np.float32) * np.float32(0.01),
    }


def merge(shapes, rank, scale, a, weight, tau, layers, sample, threads):
    """The work: the dense change of every matrix of the first `layers` layers, one after another.

    W_U = s B_U A_U, W_R = s B_R A_R, Q = basis of B_U's effective columns, weight (W_U + (I - a Q Q^T) W_R).

    Args:
        shapes: path -> (L, in, out).
        rank, scale: of both adapters.
        a, weight, tau: the merge's.
        layers: how many of L are merged.
        sample: path of the kernel whose first layer is the outcome, [in, out].
        threads: torch's.
    """
    import torch

    torch.set_num_threads(threads)

    def load(seed, path):
        pair = random_factors(path, seed, *shapes[path], rank)
        return torch.from_numpy(pair["a"]).mT, torch.from_numpy(pair["b"]).mT  # PEFT's A [L, R, in], B [L, out, R]

    user, reinforce = ({path: load(seed, path) for path in shapes} for seed in (0, 1))

    def one(path, layer):
        (a_u, b_u), (a_r, b_r) = ((side[path][0][layer], side[path][1][layer]) for side in (user, reinforce))
        w_u, w_r = scale * (b_u @ a_u), scale * (b_r @ a_r)
        values, vectors = torch.linalg.eigh(a_u @ a_u.T)
        kept = values > tau * values.max()
        q, _ = torch.linalg.qr(b_u if kept.all() else b_u @ vectors[:, kept])
        return weight * (w_u + w_r - a * (q @ (q.T @ w_r)))

    def unit(index: int):
        for layer in range(layers):
            for path in shapes:
                one(path, layer)
        return layers * len(shapes), lambda: one(sample, 0).T.numpy()

    return unit
