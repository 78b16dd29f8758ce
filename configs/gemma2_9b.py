"""Gemma-2-9B-it on the paper's rows; :paper by its recipe.

python experiments/fit_check.py --config=configs/gemma2_9b.py --topology=v5e:2x4
--config=configs/gemma2_9b.py:v5p-8 for four v5p chips, :capacity for docs/pods.md's table.

Hardware: TPU v5e-8: 7.0 of 16 GiB a chip in the user's stage, 10.5 at :capacity's rows
(eight times the protocol's tokens; docs/pods.md; compiled, not run).
Time: predicted, at least 5.5 minutes of steps for buffer, the same for reinforce, 65 s for a user (174 ms a step).
Paper: its figures for this model are not known here. Not run: no TPU was at hand.
"""

from br_jax.configs import paper

LAYERS = 42
SPEC = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "embed_dim": 3584,
    "num_layers": LAYERS,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 256,
    "ffw_dim": 14336,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "max_length": 8192,
    "post_norms": True,
    "norm_plus_one": True,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
    "query_scale": 256**-0.5,
    "attention_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
    "window": 4096,
    "windowed": (True, False) * (LAYERS // 2),
}


def get_config(preset: str = "v5e-8"):
    """The config; buffer and reinforce 5,000 rows, user 1,000 at p = 0.1."""
    return paper.get_config(
        "google/gemma-2-9b-it",
        SPEC,
        {"buffer": (5e-5, 3), "reinforce": (5e-5, 3), "user": (5e-6, 3)},
        a=1.0,
        preset=preset,
    )
