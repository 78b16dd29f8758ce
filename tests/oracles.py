"""What tests hold results against, in float64 numpy."""

import numpy as np


def delta(adapter):
    """The dense change of each kernel: scale * a @ b."""
    return {
        path: np.float64(adapter.scale) * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
        for path, pair in adapter.weights.items()
    }
