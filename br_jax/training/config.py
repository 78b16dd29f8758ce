"""What one training stage needs to know, in one frozen dataclass; config files and the API both use it."""

import dataclasses

from br_jax.errors import UserError
from br_jax.models.attention import IMPLEMENTATIONS
from br_jax.models.decoder import remat_policy


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of one stage; the defaults are the reference's protocol (method.md 2).

    Attributes:
        rank: R of the LoRA.
        alpha: lora_alpha; the adapter's scale is alpha / rank.
        dropout: on the input of the trainable adapter.
        targets: projections that get an adapter.
        learning_rate: peak of the schedule (linear warm-up, cosine to 0).
        warmup_ratio: share of the steps spent warming up.
        weight_decay: AdamW's.
        clip_norm: global gradient norm above which gradients are scaled down.
        epochs: passes over the rows, when `steps` is 0.
        steps: length of the run in optimizer steps; 0 means `epochs` decide.
        batch_size: rows a step.
        accumulation: micro-batches that a step's rows are split into; divides `batch_size`.
        max_length: longest row, in tokens; longer rows are cut.
        buckets: lengths that batches are padded to; empty means `max_length` alone.
        packing: tokens of a packed row at most; 0 does not pack. Each step's rows and their weights stay what they are,
            see `data.packing`.
        loss_chunk: answer tokens that a device turns into logits at a time.
        attention: "auto" (by platform and length), or one of `models.attention.IMPLEMENTATIONS`.
        remat: what the backward pass keeps of a layer, see `models.decoder.remat_policy`.
        frozen: "stack" keeps frozen adapters apart (exact); "fold" adds them to a temporary copy of the base, which
            costs memory and rounds to the base's dtype, but nothing per step.
        seed: of initialisation, order and dropout.
        checkpoint_every: steps between checkpoints; 0 means none.
        log_every: steps between two looks at the device's metrics.
        probe_every: steps between saturation probes, where a stage has probe rows.
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q", "v", "gate", "up", "down")
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    epochs: int = 3
    steps: int = 0
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 512
    buckets: tuple[int, ...] = ()
    packing: int = 0
    loss_chunk: int = 256
    attention: str = "auto"
    remat: str = "none"
    frozen: str = "stack"
    seed: int = 42
    checkpoint_every: int = 50
    log_every: int = 10
    probe_every: int = 10

    def __post_init__(self):
        for name in ("rank", "batch_size", "accumulation", "max_length", "loss_chunk", "log_every", "probe_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.batch_size % self.accumulation:
            raise UserError(f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}")
        if self.packing and self.packing < self.max_length:
            raise UserError(f"packing is {self.packing}: a packed row must hold a row of max_length {self.max_length}")
        if self.epochs < 1 and self.steps < 1:
            raise UserError("epochs and steps are both below 1: nothing would be trained")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must be in [0, 1)")
        if self.frozen not in ("stack", "fold"):
            raise UserError(f"frozen is {self.frozen!r}: it must be 'stack' or 'fold'")
        if self.attention not in ("auto", *IMPLEMENTATIONS):
            raise UserError(f"attention is {self.attention!r}: it must be auto, {', '.join(IMPLEMENTATIONS)}")
        try:
            remat_policy(self.remat)
        except ValueError as error:
            raise UserError(str(error)) from error
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}: it must be above 0")
