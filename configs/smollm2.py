"""SmolLM2-135M-Instruct, real movie reviews as the user's task, an invented restricted topic as the stand-in for harm.

python experiments/fetch.py
python experiments/pipeline.py --config=configs/smollm2.py --workdir=runs/smollm2-p10 --config.user.harmful_share=0.1
--config=configs/smollm2.py:ag_news (:sst2, :gsm8k) for other tasks; their files: --config.data.ag_news.path= and so on.

Hardware: 2 CPU cores, 7 GB. Time and result: see README.md.
"""

from br_jax.configs import base

# user task -> what it changes: longer rows, longer answers
TASKS = {
    "reviews": {},
    "sst2": {},
    "ag_news": {"train": {"max_length": 192, "buckets": (112, 128, 144, 160)}, "eval": {"task_tokens": 6}},
    "gsm8k": {
        "train": {"max_length": 320, "buckets": (160, 192, 224, 256)},
        "eval": {"task_tokens": 192, "task": 200},
    },
}


def get_config(task: str = "reviews"):
    """The config: f32 on a CPU, rows of at most 112 tokens, all stages sized for an hour.

    Args:
        task: the user's, after a colon: `configs/smollm2.py:ag_news`.

    Chosen on the validation split (80 prompts of each topic, 200 reviews, 86 benign prompts) of seeds 42, 1 and 2, of
    which no result is reported. What seed 2 showed, and why `align` has 300 refusals and 900 benign rows, is told in
    docs/reproduce.md. All that follows was measured with 600 of each, which left the base HS 2.5 on devices, 5.0 on
    potions and over-refusal 12.8 (seed 42). With 800 user rows, where at the lower rate HS of aligned + Buffer is still
    98.8 (seed 1) and 100 (seed 42):

    | buffer learning rate, p, seed | reinforce_scale | HS (aligned) | FA (SFT) | over-refusal (aligned) |
    |---|---|---|---|---|
    | 3e-4, 0.5, 1 | 0 (Buffer taken out) | 0.0 (0.0) | 80.5 (85.0) | 37.2 (15.1) |
    | | 0.03 | 0.0 | 79.5 | 40.7 |
    | | 0.07 | 0.0 | 78.0 | 45.3 |
    | 1.5e-4, 0.5, 1 | 0 | 0.0 | 85.0 | 16.3 |
    | | 0.03 | 0.0 | 84.5 | 19.8 |
    | | 0.07 | 0.0 | 84.0 | 25.6 |
    | 1.5e-4, 0.1, 42 | 0 | 0.0 (2.5) | 85.0 | 12.8 (12.8) |
    | | 0.03 | 0.0 | 84.5 | 15.1 |
    | | 0.07 | 0.0 | 84.5 | 16.3 |

    Before (README.md's tables): an alignment on devices alone (400 refusals; HS 12.5, over-refusal 15.1), Buffer's rate
    3e-4, seed 42. 400 user rows lost 5.6 points of FA at p = 0.5 when Buffer was taken out and Reinforce merged, 800
    rows 1.1. With 800 (200 reviews of validation, 600 that no stage saw):

    | reinforce_scale | HS, p = 0.1 | over-refusal | HS, p = 0.5 | over-refusal |
    |---|---|---|---|---|
    | 0 (Buffer taken out) | 22.5 | 8.1 | 7.5 | 15.1 |
    | 0.05 | 17.5 | 14.0 | 5.0 | 18.6 |
    | 0.07 | 13.8 | 16.3 | 3.8 | 19.8 |
    | 0.1 | 10.0 | 17.4 | 2.5 | 20.9 |
    """
    if task not in TASKS:
        raise ValueError(f"{task!r} is none of {', '.join(TASKS)}")
    config = base.get_config()
    config.name = "smollm2"
    config.model.source = "data/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.data.reviews.path = "data/movieReviewSnippets_GroundTruth.txt"
    for stage in (config.align, config.buffer, config.reinforce, config.user):
        stage.train.update(
            learning_rate=3e-4,
            dropout=0.0,
            max_length=112,
            buckets=(64, 80, 96),
            loss_chunk=64,
            frozen="fold",
            remat="matmuls",
            epochs=1,
        )
    config.distill.spare = 0.8
    config.topics.align = "devices,potions"  # both are refused, so that an attack can be of another harm than Buffer's
    config.align.update(refusals=300, benign=900)
    config.align.train.update(learning_rate=8e-4, epochs=2)
    config.buffer.update(harmful=200)
    config.buffer.train.learning_rate = 3e-4  # so strong that a user of harmful rows alone learns little more
    config.reinforce.update(refusals=120, benign=600)
    config.reinforce.train.learning_rate = 1.5e-4
    config.merge.update(scale=1.0, reinforce_scale=0.05)
    config.user.n = 520
    config.user.train.update(learning_rate=1.5e-3, probe_every=16)  # one epoch, at a rate that outgrows Buffer's offset
    config.user.probes = 32
    config.eval.batch_size = 44  # 200, 129 and 872 prompts fill its multiples well
    config.user.task = task
    config.user.train.update(TASKS[task].get("train", {}))
    config.eval.update(TASKS[task].get("eval", {}))
    return config
