"""What one training stage needs to know, in one frozen dataclass; config files and the API both use it."""

import dataclasses

from br_jax.adapters.lora import DEFAULT_TARGETS
from br_jax.core.bounds import ALPHA, BATCH, RANK, SEED, SHARE, TOKENS, number, require_bounds
from br_jax.core.errors import UserError, look_up
from br_jax.models.attention import IMPLEMENTATIONS
from br_jax.models.decoder import remat_policy
from br_jax.models.spec import ModelSpec

MOST_STEPS = 10_000_000  # of a run; every step's rate is computed beforehand


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of one stage; the defaults are the reference's protocol (method.md 2).

    Beside each number's default are its least and greatest value; another raises a `UserError`.
    """

    rank: int = number(32, *RANK)  # R of the LoRA
    alpha: float = number(64.0, *ALPHA)  # lora_alpha; the adapter's scale is alpha / rank
    dropout: float = number(0.1, 0.0, 1.0, open_high=True)  # on the input of the trainable adapter
    targets: tuple[str, ...] = DEFAULT_TARGETS  # projections that get an adapter
    learning_rate: float = number(1e-5, 0.0, 1.0, open_low=True)  # peak of the schedule (linear warm-up, cosine to 0)
    warmup_ratio: float = number(0.05, *SHARE)  # share of the steps spent warming up
    weight_decay: float = number(0.01, 0.0, 1.0)  # AdamW's
    # Global gradient norm above which gradients are scaled down.
    clip_norm: float = number(1.0, 0.0, 1e30, open_low=True)
    epochs: int = number(3, 1, 1_000_000)  # passes over the rows, when `steps` is 0
    # Warm restarts (Loshchilov & Hutter 2017, arXiv 1608.03983): the run is cut into so many equal parts, each with a
    # schedule and an optimizer of its own. After steep first steps the old second moments would hold later ones back.
    cycles: int = number(1, 1, 10_000)
    steps: int = number(0, 0, MOST_STEPS)  # length of the run in optimizer steps; 0 means `epochs` decide
    batch_size: int = number(8, *BATCH)  # rows a step
    accumulation: int = number(1, *BATCH)  # micro-batches that a step's rows are split into; divides `batch_size`
    max_length: int = number(512, *TOKENS)  # longest row, in tokens; longer rows are cut
    # Lengths that batches are padded to; empty means `max_length` alone.
    buckets: tuple[int, ...] = number((), *TOKENS._replace(many=True))
    # Tokens of a packed row at most; 0 does not pack. Each step's rows and their weights stay, see `data.batches`.
    packing: int = number(0, 0, TOKENS.high)
    loss_mean: str = "tokens"  # over all answer "tokens" of a step, or over its "rows", however long their answers
    loss_chunk: int = number(256, *TOKENS)  # answer tokens that a device turns into logits at a time
    attention: str = "auto"  # by platform and length, or one of `models.attention.IMPLEMENTATIONS`
    remat: str = "none"  # what the backward pass keeps of a layer, see `models.decoder.remat_policy`
    # "stack" keeps frozen adapters apart (exact); "fold" adds them to a temporary copy of the base, which costs memory
    # and rounds to the base's dtype, but nothing per step.
    frozen: str = "stack"
    seed: int = number(42, *SEED)  # of initialisation, order and dropout
    # Whether A comes of the seed alone, so that stages of one seed begin with the same (the reference's), or of the
    # stage's name too.
    same_start: bool = False
    checkpoint_every: int = number(50, 0, 10**9)  # steps between checkpoints; 0 means none
    log_every: int = number(10, 1, 10**9)  # steps between two looks at the device's metrics
    # Steps between saturation probes, where a stage has probe rows; 0 means none.
    probe_every: int = number(10, 0, 10**9)

    def __post_init__(self):
        require_bounds(self)
        divides, fits = self.batch_size % self.accumulation == 0, self.packing >= self.max_length
        self._require(divides, "accumulation", f"it must divide batch_size {self.batch_size}")
        self._require(fits or not self.packing, "packing", f"a row of max_length {self.max_length} must fit in")
        self._require(len(self.targets) > 0, "targets", "name at least one projection")
        self._require(isinstance(self.same_start, bool), "same_start", "it must be True or False")
        attention = ("auto", *IMPLEMENTATIONS)
        choices = {"frozen": ("stack", "fold"), "loss_mean": ("tokens", "rows"), "attention": attention}
        for name, known in choices.items():
            self._require(getattr(self, name) in known, name, f"it must be one of {', '.join(known)}")
        try:
            remat_policy(self.remat)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)!r}: {what}")


def require_fit(config: TrainConfig, spec: ModelSpec, rows: int, *, adapter: bool = True, owner: str = "") -> None:
    """Finds settings that ask more of a model or of the rows than they have, before either is loaded.

    Args:
        rows: how many there are to train on.
        adapter: whether an adapter is trained, not the params themselves.
        owner: what the settings' names stand behind in messages, as "user.train.".

    Raises:
        UserError: an unknown target, a rank above the smaller side of a matrix, rows or buckets longer than the model's
            context, no rows, or more steps than a run may have.
    """
    for target in config.targets if adapter else ():
        sides = look_up(f"{owner}targets: adapter target", target, spec.kernel_shapes)
        if config.rank > min(sides):
            size = f"the model's {target} is {sides[0]:,} x {sides[1]:,}: it must be at most {min(sides):,}"
            raise UserError(f"{owner}rank is {config.rank}: {size}")
    for name, longest in (("max_length", config.max_length), ("buckets", max(config.buckets, default=0))):
        if longest > spec.max_length:
            value = getattr(config, name)
            raise UserError(f"{owner}{name} is {value}: the model's context is {spec.max_length:,} tokens")
    if not rows:
        raise UserError(f"{owner.removesuffix('train.')}rows: there are none to train on")
    if not config.steps and -(-rows // config.batch_size) * config.epochs > MOST_STEPS:
        limit = f"on {rows:,} rows that is more than {MOST_STEPS:,} steps: lower it, or say steps"
        raise UserError(f"{owner}epochs is {config.epochs}: {limit}")
