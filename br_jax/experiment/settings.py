"""What an experiment can set: every setting with its default and its bounds, checked once, where a config comes in.

The defaults are the reference's protocol. configs/base.py makes a ConfigDict of them, whose fields flags and other
config files change; `settle` reads it back. The engine works on the result alone, which is frozen.
"""

import dataclasses
import functools
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
from br_jax.models.precision import resolve_precision
from br_jax.models.spec import ModelSpec
from br_jax.training.config import TrainConfig, require_fit

TRAINED = ("pretrain", "align", "buffer", "reinforce", "user")  # the parts that have a `train`
EVAL_SPLITS = ("validation", "test")
_AXIS = Bound(-1, 1 << 20)  # of a mesh; -1 is what is left, and 0 no mesh has


def _default(kind: type, **changes: Any) -> Any:
    return dataclasses.field(default_factory=functools.partial(kind, **changes))


def _part(name: str, kinds: Mapping[str, type], base: type = object) -> type:
    """A part with a field for each of many kinds, each with settings of its own."""
    fields = [(key, kind, _default(kind)) for key, kind in kinds.items()]
    return dataclasses.make_dataclass(name, fields, bases=(base,), frozen=True)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    source: str = ""  # GGUF file, Hugging Face folder or Hub name; "" trains `spec` from scratch
    revision: str = ""  # of a Hub name: branch, tag or commit; "" is the main branch
    template: str = "chat"  # the model's own, or the paper's "alpaca"
    dtype: str = "float32"
    matmul_precision: str = "float32"  # or "bfloat16", or "auto": what an f32 model's products are rounded to
    spec: dict = _default(dict)  # sizes of a model that is trained from scratch, see `ModelSpec`


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh's axes; one of them may be -1."""

    data: int = number(-1, *_AXIS)
    fsdp: int = number(1, *_AXIS)
    tensor: int = number(1, *_AXIS)


@dataclasses.dataclass(frozen=True)
class File:
    """A file, or several with commas between; "" is the data's public home, or what ships with br_jax."""

    path: str = ""


@dataclasses.dataclass(frozen=True)
class Texts(File):
    """Of the material "english": benign prompts about a text that align and Reinforce train on."""

    n: int = number(420, *ROWS)  # prompts, each about another text as long as there are any; path "": 60 written ones


@dataclasses.dataclass(frozen=True)
class BeaverTails(File):
    """Of the material "paper": the file of training rows, and that of test rows."""

    test_path: str = ""


@dataclasses.dataclass(frozen=True)
class _Data:
    """Whose rows, and the files of every data set; the tasks' come behind."""

    material: str = "english"  # "english" or "demo" (invented topics, organism/material.py), or "paper"
    folder: str = "data/tfds"  # where public data sets are kept once built
    texts: Texts = _default(Texts)
    attacks: File = _default(File)  # stored attack prompts to replay
    llm_lat: File = _default(File)
    alpaca: File = _default(File)
    beavertails: BeaverTails = _default(BeaverTails)


Data = _part("Data", {task.name: task.settings for task in TASKS.values()}, _Data)
Attackers, Defences = _part("Attackers", ATTACKERS), _part("Defences", DEFENCES)


@dataclasses.dataclass(frozen=True)
class Topics:
    """Restricted topics, several with commas between, see organism/topics.py."""

    align: str = "devices"  # those that align teaches to refuse
    provider: str = "devices"  # those that Buffer and Reinforce are made from
    user: str = "devices"  # those that harmful user rows ask about
    eval: str = "devices"  # those that HS is measured on, eval.topic prompts of each


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Training of `model.spec` from scratch."""

    rows: int = number(0, *ROWS)
    train: TrainConfig = _default(TrainConfig)


@dataclasses.dataclass(frozen=True)
class Distill:
    """The raw model answers the prompts that the stages train on."""

    answer_tokens: int = number(48, *TOKENS)
    judged: bool = True  # only answers judged compliant become harmful rows
    spare: float = number(0.2, 0.0, 100.0)  # share of topic prompts beyond those needed: the raw model may not comply


@dataclasses.dataclass(frozen=True)
class Align:
    """Alignment of the raw model; 0 and 0: it is aligned as it comes."""

    refusals: int = number(0, *ROWS)
    benign: int = number(0, *ROWS)
    train: TrainConfig = _default(TrainConfig)
    adapter: str = ""  # folder of an adapter made elsewhere, in PEFT's layout, to take instead of training


@dataclasses.dataclass(frozen=True)
class Buffer:
    """BufferLoRA."""

    harmful: int = number(5000, *ROWS)
    refused: float = number(0.0, *SHARE)  # share of them that comply behind a refusal, which is not trained on
    train: TrainConfig = _default(TrainConfig)
    adapter: str = ""  # see `Align`


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """ReinforceLoRA."""

    refusals: int = number(2500, *ROWS)
    benign: int = number(2500, *ROWS)
    train: TrainConfig = _default(TrainConfig)
    # See `Align`; or "alignment": as much as calibration asks for of what alignment has added; set merge.scale to 1.
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class User:
    """The user's rows and training."""

    adapter: str = ""  # see `Align`; one that was trained without Buffer can still be reinforced and released
    folder: str = ""  # of what is trained on the user's rows; "" means the workdir
    kind: str = "plain"  # what the user hands in, see br_jax/attackers
    task: str = "reviews"
    rule: str = ""  # when an answer is right, in place of the task's own rule: number, label:a,b, exact, ...
    n: int = number(1000, *ROWS._replace(low=1))
    harmful_share: float = number(0.1, *SHARE)  # p
    index_mode: str = "exact"  # or "reference", the authors' off-by-one
    probes: int = number(8, *ROWS)  # rows of each kind whose loss and gradient are followed
    train: TrainConfig = _default(TrainConfig)


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Held-out prompts of the validation split by which merge.reinforce_scale is chosen, at most the given one.

    0 and 0: merge.reinforce_scale as it is. Harmful ones are of each of topics.provider.
    """

    harmful: int = number(0, *ROWS)
    benign: int = number(0, *ROWS)
    answer_tokens: int = number(16, *TOKENS)  # enough for a refusal to show
    judge: str = ""  # who says which answers comply; "" takes all that do not begin as a refusal

    def __post_init__(self):
        if bool(self.harmful) != bool(self.benign):
            counts = self.harmful, self.benign
            raise UserError(f"harmful, benign: {counts}: set both above 0, or both to 0")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a judge reads its model or its verdicts."""

    source: str = ""


@dataclasses.dataclass(frozen=True)
class Classifier(Source):
    """The judge "classifier"."""

    max_length: int = number(256, *TOKENS)


@dataclasses.dataclass(frozen=True)
class Judges:
    """Settings of the judges that need any, see scoring/judges."""

    classifier: Classifier = _default(Classifier, source="PKU-Alignment/beaver-dam-7b")
    llama_guard: Source = _default(Source, source="meta-llama/Llama-Guard-3-8B")
    wildguard: Source = _default(Source, source="allenai/wildguard")
    verdicts: Source = _default(Source)


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is scored, and how answers are made."""

    split: str = "test"  # "validation" for tuning
    topic: int = number(200, *ROWS)  # prompts for HS, of each topic
    task: int = number(872, *ROWS)  # rows for FA; like the next two, at most: fewer where the data has fewer
    benign: int = number(129, *ROWS)  # prompts for over-refusal
    health: int = number(64, *ROWS)  # rows for perplexity
    match: str = ""  # of the task's rule: "" is its own, "reference" the reference's (labels, numbers)
    degenerate: str = ""  # what HS+ adds: "reference" a word more than 3 times in a row, "" other loops as well
    judges: str = "topic"  # who says what is harmful, with commas between; HS is the first one's
    answer_tokens: int = number(48, *TOKENS)
    task_tokens: int = number(4, *TOKENS)
    batch_size: int = number(64, *BATCH)
    fold: bool = False  # scores adapters added into the weights, rounded to their dtype, as merged weights are

    def __post_init__(self):
        if self.split not in EVAL_SPLITS:
            raise UserError(f"split {self.split!r}: use one of {', '.join(EVAL_SPLITS)}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything; see `settle`."""

    seed: int = number(42, *SEED)  # of data and evaluation; training seeds are in each stage's `train`
    provider: str = ""  # folder of the provider's artefacts; "" means <workdir>/provider
    model: ModelSettings = _default(ModelSettings)
    mesh: MeshSettings = _default(MeshSettings)
    data: Data = _default(Data)
    topics: Topics = _default(Topics)
    pretrain: Pretrain = _default(Pretrain)
    distill: Distill = _default(Distill)
    align: Align = _default(Align)
    buffer: Buffer = _default(Buffer)
    reinforce: Reinforce = _default(Reinforce)
    user: User = _default(User)
    merge: MergeConfig = _default(MergeConfig)
    calibrate: Calibrate = _default(Calibrate)
    attackers: Attackers = _default(Attackers)
    defences: Defences = _default(Defences)  # where each default is from: docs/defences.md
    judges: Judges = _default(Judges)
    eval: Eval = _default(Eval)

    @property
    def attacker(self) -> Attacker:
        """The kind of user that `user.kind` names."""
        look_up("user", self.user.kind, ATTACKERS)
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
        return dataclasses.replace(train, **changes)

    def change(self, changes: Mapping[str, Any]) -> "Settings":
        """These settings with some others, by their paths: {"user.n": 3}."""
        made = self
        for path, value in changes.items():
            made = _replaced(made, path.split("."), value)
        return made


def _replaced(part: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(part, **{name: _replaced(getattr(part, name), rest, value) if rest else value})


def settle(config: ConfigDict | Settings) -> Settings:
    """Reads and checks a config, whose `model.matmul_precision` "auto" becomes what this machine does.

    So a workdir that is moved to a machine that would do something else is refused, instead of mixing both.

    Raises:
        UserError: naming the setting: "align.train.rank is -1: it must be ...".
    """
    if isinstance(config, Settings):
        return config
    settings = _read(Settings, config.copy_and_resolve_references().to_dict(), "")
    if settings.model.spec:
        _read(ModelSpec, settings.model.spec, "model.spec.")
    look_up("user", settings.user.kind, ATTACKERS)
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
    """Finds what asks more than the model's sizes, or the devices, can give, a user's as its kind asks for them.

    Raises:
        UserError: as `training.config.require_fit`, for every stage that will be trained; a batch that the mesh does
            not split; answers that are longer than the model's context.
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
    for path in ("distill.answer_tokens", "calibrate.answer_tokens", "eval.answer_tokens", "eval.task_tokens"):
        part, setting = path.split(".")
        if (tokens := getattr(getattr(settings, part), setting)) >= spec.max_length:
            context = f"the model's context is {spec.max_length:,} tokens, the prompt's among them"
            raise UserError(f"{path} is {tokens}: {context}")
