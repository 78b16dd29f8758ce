"""What the paper's three models share: bf16 over a TPU slice, and the paper's rows.

Edited by configs/llama3_8b.py, gemma2_9b.py and qwen3_4b.py; none of its own. Arguments, after a colon:
v5e-8 (eight chips of 16 GB; the default), v5p-8 (four chips of 95 GB), and capacity: 4 rows of 1,024 tokens a chip of a
v5e-8 in every stage, which is no protocol but what experiments/fit_check.py is asked about in docs/pods.md. And paper,
alone or behind a comma: the paper's own recipe and the reference's way of counting rows and marking answers.
"""

from br_jax.configs import base

PRESETS = ("v5e-8", "v5p-8", "capacity")


def get_config(source: str, spec: dict, runs: dict[str, tuple[float, int]], a: float, preset: str = "v5e-8"):
    """The config of one model.

    Args:
        source: the model on the Hugging Face Hub; any folder of it will do (`model.source`).
        spec: its sizes and switches, for what needs no weights.
        runs: learning rate and epochs of buffer, reinforce and user.
        a: the merge's orthogonalization strength.
        preset: one of `PRESETS`, "paper", or both with a comma between.
    """
    preset, of_paper = base.read_preset(preset, PRESETS, "v5e-8")
    config = base.get_config()
    config.model.update(source=source, dtype="bfloat16", template="alpaca")
    with config.model.spec.unlocked():
        config.model.spec.update(spec)
    config.mesh.update(data=1, fsdp=-1)  # weights, adapters and moments are split over all chips
    for stage, (learning_rate, epochs) in runs.items():
        config[stage].train.update(learning_rate=learning_rate, epochs=epochs, loss_chunk=512)
        config[stage].train.remat = "matmuls" if preset == "v5p-8" else "full"
        if preset == "capacity":
            config[stage].train.update(batch_size=32, max_length=1024)
    config.merge.a = a
    config.data.material = "paper"  # LLM-LAT, Alpaca and BeaverTails
    config.user.task = "gsm8k"
    config.eval.update(judges="classifier", topic=1000, task=1000, batch_size=32, answer_tokens=512, task_tokens=512)
    if of_paper:
        for stage in ("buffer", "reinforce", "user"):
            config[stage].train.same_start = True
        config.user.index_mode = "reference"
        config.eval.degenerate = "reference"
        config.eval.fold = True
        config.eval.match = "reference"
    else:
        base.ours(config)
    return config
