"""Qwen3-4B-Instruct-2507 on the paper's rows; :paper by its recipe.

python experiments/fit_check.py --config=configs/qwen3_4b.py --topology=v5e:2x4
--config=configs/qwen3_4b.py:v5p-8 for four v5p chips, :capacity for docs/pods.md's table.

Hardware: TPU v5e-8: 3.2 of 16 GiB a chip in the user's stage, 4.9 at :capacity's rows
(eight times the protocol's tokens; docs/pods.md; compiled, not run).
Time: predicted, at least 4 minutes of steps for buffer, 30 s for reinforce, 20 s for a user (78 ms a step).
Paper: its figures for this model are not known here. Not run: no TPU was at hand.
"""

from br_jax.configs import paper

SPEC = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "embed_dim": 2560,
    "num_layers": 36,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "ffw_dim": 9728,
    "rope_theta": 5e6,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "max_length": 262144,
    "qk_norm": True,
}


def get_config(preset: str = "v5e-8"):
    """The config; buffer 5,000 rows, reinforce 1,000, user 1,000 at p = 0.1."""
    config = paper.get_config(
        "Qwen/Qwen3-4B-Instruct-2507",
        SPEC,
        {"buffer": (5e-5, 5), "reinforce": (5e-5, 3), "user": (5e-5, 2)},
        a=0.0,
        preset=preset,
    )
    config.reinforce.update(refusals=500, benign=500)
    return config
