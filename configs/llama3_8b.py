"""Llama-3-8B-Instruct, on the paper's rows; :paper by its recipe.

python experiments/fit_check.py --config=configs/llama3_8b.py --topology=v5e:2x4
--config=configs/llama3_8b.py:v5p-8 for four v5p chips, :capacity for docs/pods.md's table; :1b is Llama-3.2-1B and
:70b Llama-3-70B at capacity's rows.

Hardware: TPU v5e-8: 4.4 of 16 GiB a chip in the user's stage, 6.6 at :capacity's rows
(eight times the protocol's tokens; docs/pods.md; compiled, not run).
Time: predicted, at least 4.5 minutes of steps for buffer, the same for reinforce, 53 s for a user (142 ms a step).
Paper (second-hand, GSM8K, p = 0.1): HS 8.1, FA 76.6; SFT HS 75.2, FA 69.0. Not run: no TPU was at hand.
"""

from br_jax.configs import base, paper

SIZES = {
    "8b": {"embed_dim": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128, "ffw_dim": 14336},
    "1b": {"embed_dim": 2048, "num_layers": 16, "num_heads": 32, "head_dim": 64, "ffw_dim": 8192},
    "70b": {"embed_dim": 8192, "num_layers": 80, "num_heads": 64, "head_dim": 128, "ffw_dim": 28672},
}
ROPE_3_2 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}


def get_config(preset: str = "v5e-8"):
    """The config; buffer and reinforce 5,000 rows, user 1,000 at p = 0.1."""
    word, of_paper = base.read_preset(preset, (*SIZES, *paper.PRESETS), "v5e-8")
    size, machine = (word, "capacity") if word in SIZES else ("8b", word)
    spec = {
        **SIZES[size],
        "vocab_size": 128256,
        "num_kv_heads": 8,
        "rope_theta": 500000.0,
        "rope_scaling": ROPE_3_2 if size == "1b" else None,
        "norm_eps": 1e-5,
        "tie_embeddings": size == "1b",
        "max_length": 131072 if size == "1b" else 8192,
    }
    sources = {"1b": "meta-llama/Llama-3.2-1B-Instruct", "70b": "meta-llama/Meta-Llama-3-70B-Instruct"}
    return paper.get_config(
        sources.get(size, "meta-llama/Meta-Llama-3-8B-Instruct"),
        spec,
        {"buffer": (1e-5, 3), "reinforce": (1e-5, 3), "user": (1e-5, 3)},
        a=0.1,
        preset=f"{machine},paper" if of_paper else machine,
    )
