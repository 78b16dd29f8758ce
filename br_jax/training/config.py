"""What one training stage needs to know, in one frozen dataclass; config files and the API both use it."""

import dataclasses

from br_jax.adapters.lora import DEFAULT_TARGETS
from br_jax.errors import UserError
from br_jax.models.attention import IMPLEMENTATIONS
from br_jax.models.decoder import remat_policy


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of one stage; the defaults are the reference's protocol (method.md 2)."""

    rank: int = 32  # R of the LoRA
    alpha: float = 64.0  # lora_alpha; the adapter's scale is alpha / rank
    dropout: float = 0.1  # on the input of the trainable adapter
    targets: tuple[str, ...] = DEFAULT_TARGETS  # projections that get an adapter
    learning_rate: float = 1e-5  # peak of the schedule (linear warm-up, cosine to 0)
    warmup_ratio: float = 0.05  # share of the steps spent warming up
    weight_decay: float = 0.01  # AdamW's
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down
    epochs: int = 3  # passes over the rows, when `steps` is 0
    # Warm restarts (Loshchilov & Hutter 2017, arXiv 1608.03983): the run is cut into so many equal parts, each with a
    # schedule and an optimizer of its own. After steep first steps the old second moments would hold later ones back.
    cycles: int = 1
    steps: int = 0  # length of the run in optimizer steps; 0 means `epochs` decide
    batch_size: int = 8  # rows a step
    accumulation: int = 1  # micro-batches that a step's rows are split into; divides `batch_size`
    max_length: int = 512  # longest row, in tokens; longer rows are cut
    buckets: tuple[int, ...] = ()  # lengths that batches are padded to; empty means `max_length` alone
    # Tokens of a packed row at most; 0 does not pack. Each step's rows and their weights stay, see `data.packing`.
    packing: int = 0
    loss_mean: str = "tokens"  # over all answer "tokens" of a step, or over its "rows", however long their answers
    loss_chunk: int = 256  # answer tokens that a device turns into logits at a time
    attention: str = "auto"  # by platform and length, or one of `models.attention.IMPLEMENTATIONS`
    remat: str = "none"  # what the backward pass keeps of a layer, see `models.decoder.remat_policy`
    # "stack" keeps frozen adapters apart (exact); "fold" adds them to a temporary copy of the base, which costs memory
    # and rounds to the base's dtype, but nothing per step.
    frozen: str = "stack"
    seed: int = 42  # of initialisation, order and dropout
    checkpoint_every: int = 50  # steps between checkpoints; 0 means none
    log_every: int = 10  # steps between two looks at the device's metrics
    probe_every: int = 10  # steps between saturation probes, where a stage has probe rows; 0 means none

    def __post_init__(self):
        for name in ("rank", "cycles", "batch_size", "accumulation", "max_length", "loss_chunk", "log_every"):
            self._require(getattr(self, name) >= 1, name, "it must be at least 1")
        self._require(self.probe_every >= 0, "probe_every", "it must be at least 1, or 0 for none")
        divides, fits = self.batch_size % self.accumulation == 0, self.packing >= self.max_length
        self._require(divides, "accumulation", f"it must divide batch_size {self.batch_size}")
        self._require(fits or not self.packing, "packing", f"a row of max_length {self.max_length} must fit in")
        self._require(self.epochs >= 1 or self.steps >= 1, "epochs", "without steps nothing would be trained")
        self._require(0 <= self.dropout < 1, "dropout", "it must be in [0, 1)")
        self._require(self.learning_rate > 0, "learning_rate", "it must be above 0")
        choices = {
            "frozen": ("stack", "fold"),
            "loss_mean": ("tokens", "rows"),
            "attention": ("auto", *IMPLEMENTATIONS),
        }
        for name, known in choices.items():
            self._require(getattr(self, name) in known, name, f"it must be one of {', '.join(known)}")
        try:
            remat_policy(self.remat)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)!r}: {what}")
