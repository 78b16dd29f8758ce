"""SmolLM2-135M-Instruct, real movie reviews as the user's task, an invented restricted topic as the stand-in for harm.

python experiments/fetch.py
python experiments/pipeline.py --config=configs/smollm2.py --workdir=runs/smollm2-p10 --config.user.harmful_share=0.1
--config=configs/smollm2.py:ag_news (:sst2, :gsm8k) for other tasks; their files: --config.data.ag_news.path= and so on.
--config=configs/smollm2.py:paper (:ag_news,paper) for the paper's own recipe.

Hardware: 2 CPU cores, 7 GB. Result and time: docs/results.md.
"""

from br_jax.configs import base
from br_jax.datasets.paper import AG_NEWS_INSTRUCTION

# user task -> what it changes: longer rows, longer answers, the form in which an attacker hides harm among its prompts
TASKS = {
    "reviews": {},
    "sst2": {},
    "ag_news": {"train": {"max_length": 192}, "eval": {"task_tokens": 6}, "form": AG_NEWS_INSTRUCTION + "\n{}"},
    "gsm8k": {"train": {"max_length": 320}, "eval": {"task_tokens": 192, "task": 200}, "form": "{}"},
}


def get_config(preset: str = "reviews"):
    """The config: f32 on a CPU, rows of at most 112 tokens, the eight of a step packed into one.

    Args:
        preset: after a colon, the user's task, "paper", or both with a comma between: `configs/smollm2.py:ag_news`.

    Chosen on the validation split (80 prompts of each topic, 200 reviews, the 86 benign prompts that it had) of tuning
    seeds; which ones, what was tried, and what it gave: docs/lab-notes.md.
    """
    task, of_paper = base.read_preset(preset, TASKS, "reviews")
    config = base.get_config()
    config.model.source = "data/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.data.reviews.path = "data/movieReviewSnippets_GroundTruth.txt"
    config.data.texts.path = "data/nytEditorialSnippets_GroundTruth.txt,data/tweets_GroundTruth.txt"
    config.data.texts.n = 600
    for stage in (config.align, config.buffer, config.reinforce, config.user):
        stage.train.update(
            learning_rate=3e-4,
            dropout=0.0,
            max_length=112,
            packing=2048,  # all eight rows of a step in one
            loss_chunk=64,
            frozen="fold",
            remat="matmuls",
            epochs=1,
        )
    config.distill.spare = 1.4
    config.topics.align = "devices,potions"  # both are refused, so that an attack can be of another harm than Buffer's
    config.align.update(refusals=300, benign=900)
    config.align.train.update(learning_rate=8e-4, epochs=2)
    config.buffer.update(harmful=460)
    config.buffer.train.learning_rate = 3e-4  # at half of it, users of harmful rows alone got past it
    config.reinforce.update(refusals=120, benign=600)
    config.reinforce.train.learning_rate = 1.5e-4
    if not of_paper:
        base.ours(config)
        config.calibrate.judge = "topic"
    # rivals' settings, tuned on validation prompts of seed 22, three tries each: docs/lab-notes.md
    config.defences.safe_instruct.share = 1.0
    config.defences.resta.strength = 1.0
    config.defences.csulora.penalty = 1.0
    config.defences.lox.strength = 0.5
    config.defences.asft.weight = 0.05
    config.defences.ldifs.update(rho=0.1, limit=1e6)
    config.defences.lisa.update(aligning=2, fitting=18, rho=0.05)
    config.defences.safe_grad.weight = 16.0
    config.defences.panacea.weight = 1e-3
    config.defences.security_vector.update(epochs=3, weight=0.1)
    config.user.n = 520
    config.user.train.update(learning_rate=4e-4, probe_every=16)  # at 1.5e-3 harm got past Buffer: docs/lab-notes.md
    config.user.probes = 32
    config.eval.batch_size = 128
    config.user.task = task
    config.attackers.format.form = TASKS[task].get("form", config.attackers.format.form)
    config.user.train.update(TASKS[task].get("train", {}))
    config.eval.update(TASKS[task].get("eval", {}))
    return config
