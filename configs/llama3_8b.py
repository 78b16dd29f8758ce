"""Llama-3-8B-Instruct with the paper's LoRA, on one host of eight v5e chips.

python experiments/fit_check.py --config=configs/llama3_8b.py --topology=v5e:2x4
--config=configs/llama3_8b.py:1b is Llama-3.2-1B, :70b is Llama-3-70B.

Hardware: TPU v5e-8 or larger. Not run: compiled for the TPU, see docs/scaling.md.
"""

from br_jax.configs import base

SIZES = {
    "1b": {"embed_dim": 2048, "num_layers": 16, "num_heads": 32, "head_dim": 64, "ffw_dim": 8192},
    "8b": {"embed_dim": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128, "ffw_dim": 14336},
    "70b": {"embed_dim": 8192, "num_layers": 80, "num_heads": 64, "head_dim": 128, "ffw_dim": 28672},
}


def get_config(size: str = "8b"):
    """The config: bf16, params and optimizer split over all chips (FSDP), 4 rows of 1,024 tokens a chip of eight."""
    config = base.get_config()
    config.name = f"llama3_{size}"
    config.model.dtype = "bfloat16"
    config.model.template = "alpaca"
    with config.model.spec.unlocked():
        config.model.spec.update(
            SIZES[size],
            vocab_size=128256,
            num_kv_heads=8,
            rope_theta=500000.0,
            norm_eps=1e-5,
            tie_embeddings=size == "1b",
            max_length=8192,
        )
    config.mesh.update(data=1, fsdp=-1)
    for stage in (config.buffer, config.reinforce, config.user):
        stage.train.update(batch_size=32, max_length=1024, loss_chunk=512, remat="full")
    config.eval.update(batch_size=32, answer_tokens=512)
    return config
