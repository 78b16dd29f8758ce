"""What tests hold results against, in float64 numpy."""

import numpy as np


def delta(adapter):
    """The dense change of each kernel: scale * a @ b."""
    return {
        path: np.float64(adapter.scale) * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
        for path, pair in adapter.weights.items()
    }


def logits_of_torch(network, ids, positions=None):
    """A transformers model's logits of one row, [T, V]."""
    import torch

    where = torch.tensor([range(len(ids)) if positions is None else positions])
    given = {"attention_mask": torch.ones_like(where), "position_ids": where}
    with torch.no_grad():
        return network(torch.tensor([[*ids]]), **given).logits[0].float().numpy()
