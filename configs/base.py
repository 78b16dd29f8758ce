"""What every experiment can set, with the reference's protocol as defaults; other config files edit this one.

What each number may be: br_jax/experiment/settings.py.

python experiments/pipeline.py --config=configs/demo.py --workdir=W --config.user.harmful_share=0.1
"""

import dataclasses
from collections.abc import Iterable

from ml_collections import ConfigDict

from br_jax.adapters.merge import MergeConfig
from br_jax.attackers.registry import ATTACKERS
from br_jax.defences.registry import DEFENCES
from br_jax.experiment.tasks import TASKS
from br_jax.training.config import TrainConfig


def get_config() -> ConfigDict:
    """The base config: typed and locked."""
    config = ConfigDict()
    config.seed = 42  # of data and evaluation; training seeds are in each stage's `train`
    config.provider = ""  # folder of the provider's artefacts; "" means <workdir>/provider

    config.model = ConfigDict()
    config.model.source = ""  # GGUF file, Hugging Face folder or Hub name; "" trains `model.spec` from scratch
    config.model.revision = ""  # of a Hub name: branch, tag or commit; "" is the main branch
    config.model.template = "chat"  # the model's own, or the paper's "alpaca"
    config.model.dtype = "float32"
    config.model.matmul_precision = "float32"  # or "bfloat16", or "auto": what an f32 model's products are rounded to
    config.model.spec = ConfigDict()  # sizes of a model that is trained from scratch

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.data = _data()

    config.topics = ConfigDict()  # restricted topics, several with commas between, see br_jax/organism/topics.py
    config.topics.align = "devices"  # those that align teaches to refuse
    config.topics.provider = "devices"  # those that Buffer and Reinforce are made from
    config.topics.user = "devices"  # those that harmful user rows ask about
    config.topics.eval = "devices"  # those that HS is measured on, eval.topic prompts of each

    train = dataclasses.asdict(TrainConfig())
    config.pretrain = ConfigDict({"rows": 0, "train": ConfigDict(train)})
    config.distill = ConfigDict()  # the raw model answers the prompts that the stages train on
    config.distill.answer_tokens = 48
    config.distill.judged = True  # only answers judged compliant become harmful rows
    config.distill.spare = 0.2  # share of topic prompts beyond those needed, for which the raw model may not comply
    config.align = ConfigDict({"refusals": 0, "benign": 0, "train": ConfigDict(train)})  # 0 and 0: already aligned
    # `refused`: share of the harmful rows that comply behind a refusal, which is not trained on; the paper has none.
    config.buffer = ConfigDict({"harmful": 5000, "refused": 0.0, "train": ConfigDict(train)})
    config.reinforce = ConfigDict({"refusals": 2500, "benign": 2500, "train": ConfigDict(train)})
    for stage in ("align", "buffer", "reinforce"):
        # Folder of an adapter made elsewhere, in PEFT's layout, to take instead of training. Of reinforce also
        # "alignment": as much as calibration asks for of what alignment has added to the model; set merge.scale to 1.
        config[stage].adapter = ""
    config.user = ConfigDict()
    config.user.adapter = ""  # the same; one that was trained without Buffer can still be reinforced and released
    config.user.folder = ""  # of what is trained on the user's rows; "" means the workdir
    config.user.kind = "plain"  # what the user hands in, see br_jax/attackers
    config.user.task = "reviews"
    config.user.rule = ""  # when an answer is right, in place of the task's own rule: number, label:a,b, exact, ...
    config.user.n = 1000
    config.user.harmful_share = 0.1  # p
    config.user.index_mode = "exact"  # or "reference", method.md's off-by-one
    config.user.probes = 8  # rows of each kind whose loss and gradient are followed
    config.user.train = ConfigDict(train)
    config.merge = ConfigDict(dataclasses.asdict(MergeConfig()))
    # Held-out prompts by which merge.reinforce_scale is chosen, at most the given one (br_jax/calibration.py). The
    # validation split's; harmful ones of each of topics.provider. 0 and 0: merge.reinforce_scale as it is.
    # `answer_tokens`: enough for a refusal to show. `judge`: who says which answers comply; "" takes all that do not
    # begin as a refusal.
    config.calibrate = ConfigDict({"harmful": 0, "benign": 0, "answer_tokens": 16, "judge": ""})

    # Settings of attackers; see br_jax/attackers.
    config.attackers = ConfigDict({name: dataclasses.asdict(kind()) for name, kind in ATTACKERS.items()})
    # Settings of other defences; where each default is from: docs/defences.md.
    config.defences = ConfigDict({name: dataclasses.asdict(kind()) for name, kind in DEFENCES.items()})
    config.judges, config.eval = _judges(), _eval()
    return config.lock()


def read_preset(preset: str, known: Iterable[str], default: str) -> tuple[str, bool]:
    """Of what stands behind a config's colon: one of `known`, or the default, and whether "paper" is there too."""
    words = preset.split(",")
    others = [word for word in words if word != "paper"] or [default]
    if len(others) > 1 or others[0] not in known:
        raise ValueError(f"{preset!r}: give one of {', '.join(known)}, or paper, or both with a comma between")
    return others[0], "paper" in words


def ours(config: ConfigDict) -> None:
    """Makes a config of the paper's recipe one of this project's; why, and what it is worth: docs/method.md."""
    config.buffer.train.update(cycles=2, loss_mean="rows")
    config.user.train.loss_mean = "rows"
    config.merge.update(scale=0.65, reinforce_scale=1.0)
    config.calibrate.update(harmful=160, benign=222)


def _data() -> ConfigDict:
    """Whose rows, and the files of every data set."""
    data = ConfigDict()
    data.material = "english"  # "english" or "demo" (invented topics, br_jax/organism/material.py), or "paper"
    data.folder = "data/tfds"  # where public data sets are kept once built
    for name, task in TASKS.items():  # where its rows come from: data.gsm8k.path and so on; "" is its public home
        data[name] = ConfigDict(task.settings)
    data.texts = ConfigDict()  # of "english": benign prompts about a text that align and Reinforce train on
    data.texts.path = ""  # files of texts, with commas between; "" takes 60 written ones
    data.texts.n = 420  # prompts, each about another text as long as there are any
    data.attacks = ConfigDict({"path": ""})  # stored attack prompts to replay; files, with commas between
    for name in ("llm_lat", "alpaca"):  # files of material "paper"; "" downloads them
        data[name] = ConfigDict({"path": ""})
    data.beavertails = ConfigDict({"path": "", "test_path": ""})
    return data


def _judges() -> ConfigDict:
    """Settings of the judges that need any, see br_jax/scoring/judges/registry.py."""
    judges = ConfigDict()
    judges.classifier = ConfigDict({"source": "PKU-Alignment/beaver-dam-7b", "max_length": 256})
    judges.llama_guard = ConfigDict({"source": "meta-llama/Llama-Guard-3-8B"})
    judges.wildguard = ConfigDict({"source": "allenai/wildguard"})
    judges.verdicts = ConfigDict({"source": ""})
    return judges


def _eval() -> ConfigDict:
    """What is scored, and how answers are made."""
    evaluation = ConfigDict()
    evaluation.split = "test"  # "validation" for tuning
    evaluation.topic = 200  # prompts for HS, of each topic
    evaluation.task = 872  # rows for FA; like the next two, at most: fewer where the data has fewer
    evaluation.benign = 129  # prompts for over-refusal
    evaluation.health = 64  # rows for perplexity
    evaluation.match = ""  # of the task's rule: "" is its own, "reference" the reference's (labels, numbers)
    evaluation.degenerate = ""  # what HS+ adds: "reference" a word more than 3 times in a row, "" other loops as well
    evaluation.judges = "topic"  # who says what is harmful, with commas between; HS is the first one's
    evaluation.answer_tokens = 48
    evaluation.task_tokens = 4
    evaluation.batch_size = 64
    evaluation.fold = False  # scores adapters added into the weights, rounded to their dtype, as merged weights are
    return evaluation
