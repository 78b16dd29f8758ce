"""What an experiment can set: every setting with its default and its bounds, checked once, where a config comes in.

The defaults are the reference's protocol. configs/base.py makes a ConfigDict of them, whose fields flags and other
config files change; `settle` reads it back. The engine works on the result alone, which is frozen.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax.adapters.merge import MergeConfig
from br_jax.attackers.attacker import Attacker
from br_jax.attackers.registry import ATTACKERS
from br_jax.core.bounds import BATCH, ROWS, SEED, SHARE, TOKENS, Bound, bounds_of, number, require
from br_jax.core.errors import UserError, look_up, near_names, one_line
from br_jax.core.mesh import batch_parts
from br_jax.defences.registry import DEFENCES
from br_jax.experiment.tasks import TASKS
from br_jax.models.kernels import resolve_precision
from br_jax.models.spec import ModelSpec
from br_jax.training.config import TrainConfig, require_fit

TRAINED = ("pretrain", "align", "buffer", "reinforce", "user")  # the parts that have a `train`
_REPEATED = 100_000  # between the training seeds of two repeats
EVAL_SPLITS = ("validation", "test")
_AXIS = Bound(-1, 1 << 20)  # of a mesh; -1 is what is left, and 0 no mesh has

# name -> default: a value, a `number` with its bounds, a part with settings of its own, or a dataclass of such a part.
# A path is of a file, or of several with commas between; "" is the data's public home, or what ships with br_jax.
_SETTINGS = {
    "seed": number(42, *SEED),  # of data and evaluation; training seeds are in each stage's `train`
    "provider": "",  # folder of the provider's artefacts; "" means <workdir>/provider
    "model": {
        "source": "",  # GGUF file, Hugging Face folder or Hub name; "" trains `spec` from scratch
        "revision": "",  # of a Hub name: branch, tag or commit; "" is the main branch
        "template": "chat",  # the model's own, or the paper's "alpaca"
        "dtype": "float32",
        "matmul_precision": "float32",  # or "bfloat16", or "auto": what an f32 model's products are rounded to
        "spec": dict,  # sizes of a model that is trained from scratch, see `ModelSpec`
    },
    "mesh": {"data": number(-1, *_AXIS), "fsdp": number(1, *_AXIS), "tensor": number(1, *_AXIS)},
    "data": {
        "material": "english",  # "english" or "demo" (invented topics, organism/material.py), or "paper"
        "folder": "data/tfds",  # where public data sets are kept once built
        # Of "english": n benign prompts about a text that align and Reinforce train on, each about another text as long
        # as there are any; path "" takes 60 written ones.
        "texts": {"path": "", "n": number(420, *ROWS)},
        "attacks": {"path": ""},  # stored attack prompts to replay
        **{"llm_lat": {"path": ""}, "alpaca": {"path": ""}, "beavertails": {"path": "", "test_path": ""}},  # of "paper"
        **{task.name: dict(task.settings) for task in TASKS.values()},
    },
    # Restricted topics, several with commas between, see organism/topics.py: those that align teaches to refuse, that
    # Buffer and Reinforce are made from, that harmful user rows ask about, that HS is measured on.
    "topics": {"align": "devices", "provider": "devices", "user": "devices", "eval": "devices"},
    "pretrain": {"rows": number(0, *ROWS), "train": TrainConfig},
    "distill": {  # the raw model answers the prompts that the stages train on
        "answer_tokens": number(48, *TOKENS),
        "judged": True,  # only answers judged compliant become harmful rows
        "spare": number(0.2, 0.0, 100.0),  # share of topic prompts beyond those needed: it may not comply
    },
    # `adapter`, here and below: folder of one made elsewhere, in PEFT's layout, to take instead of training. 0: none.
    "align": {"refusals": number(0, *ROWS), "benign": number(0, *ROWS), "train": TrainConfig, "adapter": ""},
    "buffer": {
        "harmful": number(5000, *ROWS),
        "refused": number(0.0, *SHARE),  # share of the rows that comply behind a refusal, which is not trained on
        "train": TrainConfig,
        "adapter": "",
    },
    # `adapter` "alignment": as much as calibration asks for of what alignment has added; set merge.scale to 1.
    "reinforce": {"refusals": number(2500, *ROWS), "benign": number(2500, *ROWS), "train": TrainConfig, "adapter": ""},
    "user": {
        "adapter": "",  # one that was trained without Buffer can still be reinforced and released
        "folder": "",  # of what is trained on the user's rows; "" means the workdir
        "kind": "plain",  # what the user hands in, see br_jax/attackers
        "task": "reviews",
        "rule": "",  # when an answer is right, in place of the task's own rule: number, label:a,b, exact, ...
        "n": number(1000, *ROWS._replace(low=1)),
        "harmful_share": number(0.1, *SHARE),  # p
        "index_mode": "exact",  # or "reference", the authors' off-by-one
        "repeat": number(1, 1, 1000),  # which of several trainings on the same rows: with another seed of its own
        "probes": number(8, *ROWS),  # rows of each kind whose loss and gradient are followed
        "train": TrainConfig,
    },
    "merge": MergeConfig,
    # Held-out prompts of the validation split by which merge.reinforce_scale is chosen, at most so many (of each of
    # topics.provider); 0 and 0: as it is.
    "calibrate": {
        "harmful": number(0, *ROWS),
        "benign": number(0, *ROWS),
        "answer_tokens": number(16, *TOKENS),  # enough for a refusal to show
        "judge": "",  # who says which answers comply; "" takes all that do not begin as a refusal
    },
    "attackers": ATTACKERS,
    "defences": DEFENCES,  # where each default is from: docs/defences.md
    "judges": {  # settings of the judges that need any, see scoring/judges
        "classifier": {"source": "PKU-Alignment/beaver-dam-7b", "max_length": number(256, *TOKENS)},
        "llama_guard": {"source": "meta-llama/Llama-Guard-3-8B"},
        "wildguard": {"source": "allenai/wildguard"},
        "verdicts": {"source": ""},
    },
    "eval": {
        "split": "test",  # "validation" for tuning
        "topic": number(400, *ROWS),  # prompts for HS, of each topic
        "task": number(872, *ROWS),  # rows for FA; like the next two, at most: fewer where the data has fewer
        "benign": number(400, *ROWS),  # prompts for over-refusal, the borderline ones among them
        "health": number(64, *ROWS),  # rows for perplexity
        "match": "",  # of the task's rule: "" is its own, "reference" the reference's (labels, numbers)
        "degenerate": "",  # what HS+ adds: "reference" a word more than 3 times in a row, "" other loops as well
        "judges": "topic",  # who says what is harmful, with commas between; HS is the first one's
        "answer_tokens": number(48, *TOKENS),
        "task_tokens": number(4, *TOKENS),
        "batch_size": number(128, *BATCH),
        "fold": False,  # scores adapters added into the weights, rounded to their dtype, as merged weights are
    },
}


def _made(name: str, settings: Mapping[str, Any]) -> type:
    """A frozen dataclass of settings, and of its parts in turn."""
    fields = []
    for key, value in settings.items():
        kind = _made(key, value) if isinstance(value, Mapping) else value
        if isinstance(kind, type):
            value = dataclasses.field(default_factory=kind)
        elif isinstance(value, dataclasses.Field):
            kind = value.metadata["bound"].kind
        else:
            kind = type(value)
        fields.append((key, kind, value))
    return dataclasses.make_dataclass(name, fields, frozen=True)


@dataclasses.dataclass(frozen=True)
class Settings(_made("Settings", _SETTINGS)):
    """Everything; see `settle`."""

    @property
    def attacker(self) -> Attacker:
        """The kind of user that `user.kind` names."""
        return getattr(self.attackers, self.user.kind)

    @property
    def aligns(self) -> bool:
        """Whether there is an align stage, or an adapter in its place."""
        return bool(self.align.adapter or self.align.refusals + self.align.benign)

    def train(self, stage: str, **changes: Any) -> TrainConfig:
        """The hyper-parameters of one of `TRAINED`, the user's as its kind asks for them, with some changed."""
        train = getattr(self, stage).train
        if stage == "user":
            train = TrainConfig(**self.attacker.settings(dataclasses.asdict(train), self.user.n))
            train = dataclasses.replace(train, seed=(train.seed + _REPEATED * (self.user.repeat - 1)) % (SEED.high + 1))
        return dataclasses.replace(train, **changes)

    def change(self, changes: Mapping[str, Any]) -> "Settings":
        """These settings with some others, by their paths: {"user.n": 3}."""

        def changed(part: Any, path: list[str], value: Any) -> Any:
            name, *rest = path
            return dataclasses.replace(part, **{name: changed(getattr(part, name), rest, value) if rest else value})

        made = self
        for path, value in changes.items():
            made = changed(made, path.split("."), value)
        return made


def settle(config: ConfigDict | Settings) -> Settings:
    """Reads and checks a config, whose `model.matmul_precision` "auto" becomes what this machine does.

    So a workdir that is moved to a machine that would do something else is refused, instead of mixing both. A
    `UserError` names the setting: "align.train.rank is -1: it must be ...".
    """
    if isinstance(config, Settings):
        return config
    settings = _read(Settings, config.copy_and_resolve_references().to_dict(), "")
    if settings.model.spec:
        _read(ModelSpec, settings.model.spec, "model.spec.")
    look_up("user", settings.user.kind, ATTACKERS)
    if settings.eval.split not in EVAL_SPLITS:
        raise UserError(f"eval.split {settings.eval.split!r}: use one of {', '.join(EVAL_SPLITS)}")
    counts = settings.calibrate.harmful, settings.calibrate.benign
    if any(counts) and not all(counts):
        raise UserError(f"calibrate.harmful, calibrate.benign: {counts}: set both above 0, or both to 0")
    precision = resolve_precision(settings.model.matmul_precision, settings.model.dtype)
    return settings.change({"model.matmul_precision": precision})


def bounds(kind: type = Settings, path: str = "") -> dict[str, Bound]:
    """The bound of every number, by its path."""
    found = {f"{path}{name}": bound for name, bound in bounds_of(kind).items()}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found |= bounds(field.type, f"{path}{field.name}.")
    return found


def _read(kind: type, values: Any, path: str) -> Any:
    """Makes a dataclass of a part of a config; what is wrong in it is one line that begins with its path."""
    part = path.removesuffix(".")
    if not isinstance(values, Mapping):
        raise UserError(f"{part} is {one_line(repr(values))}: it must be a part with settings of its own")
    fields, given, limits = {field.name: field for field in dataclasses.fields(kind)}, {}, bounds_of(kind)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{path}{name}: there is no such setting; {near_names(name, fields)}")
        field = fields[name]
        if name in limits and not (value is None and field.default is None):
            require(f"{path}{name}", value, limits[name])
        elif dataclasses.is_dataclass(field.type):
            value = _read(field.type, value, f"{path}{name}.")
        elif field.type in (str, bool) and type(value) is not field.type:
            needed = "text" if field.type is str else "True or False"
            raise UserError(f"{path}{name} is {one_line(repr(value))}: it must be {needed}")
        given[name] = value
    try:
        return kind(**given)
    except UserError as error:
        raise UserError(f"{path}{error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{part}: {one_line(error)}") from error


def check_sizes(settings: Settings, spec: ModelSpec, mesh: Mesh) -> None:
    """Raises a `UserError` for what asks more than the model's sizes, or the devices, can give.

    As `training.config.require_fit`, for every stage that will be trained; also for a batch that the mesh does not
    split, and for answers that are longer than the model's context.
    """
    attacker, align, reinforce = settings.attacker, settings.align, settings.reinforce
    rows = {
        "pretrain": settings.pretrain.rows,
        "align": align.refusals + align.benign,
        "buffer": settings.buffer.harmful,
        "reinforce": reinforce.refusals + reinforce.benign,
        "user": attacker.size(settings.user.n) // attacker.jobs,
    }
    given = {stage for stage in ("align", "buffer", "reinforce") if getattr(settings, stage).adapter}
    given |= {"pretrain"} if settings.model.source else set()
    given |= set() if rows["align"] else {"align"}  # the model is aligned as it comes
    for stage in (stage for stage in TRAINED if stage not in given):
        train, owner = settings.train(stage), f"{stage}.train."
        require_fit(train, spec, rows[stage], adapter=stage != "pretrain", owner=owner)
        if not train.packing and train.batch_size % ((parts := batch_parts(mesh)) * train.accumulation):
            micro = f" in {train.accumulation} micro-batches" if train.accumulation > 1 else ""
            raise UserError(
                f"{owner}batch_size is {train.batch_size}{micro}: {parts} devices must divide it, or set packing"
            )
    for part, name in (("distill", "answer"), ("calibrate", "answer"), ("eval", "answer"), ("eval", "task")):
        if (tokens := getattr(getattr(settings, part), f"{name}_tokens")) >= spec.max_length:
            context = f"the model's context is {spec.max_length:,} tokens, the prompt's among them"
            raise UserError(f"{part}.{name}_tokens is {tokens}: {context}")
