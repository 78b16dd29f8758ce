"""One optimizer step, ours against PEFT on PyTorch: same weights, same first adapter, same rows, same loss."""

import dataclasses

import jax
import numpy as np

from benchmarks.inputs import HERE, Setup, require_torch
from benchmarks.pairing import Contender
from benchmarks.report import Case
from br_jax.adapters.lora import Adapter, collection
from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh, shard
from br_jax.data.batches import encode_rows
from br_jax.data.rows import Row
from br_jax.defences.registry import DEFENCES
from br_jax.models.model import Model
from br_jax.provider import load_model
from br_jax.training.batching import step_batches
from br_jax.training.config import TrainConfig
from br_jax.training.loop import on_mesh
from br_jax.training.run import first_adapter
from br_jax.training.step import (
    Hyper,
    Objective,
    Stage,
    frozen_collections,
    init_state,
    learning_rates,
    train_step,
    trainable_adapter,
)

PROTOCOL = TrainConfig(dropout=0.0, learning_rate=1e-4)
_OF_OTHERS = ("dropout", "learning_rate", "warmup_ratio", "weight_decay", "clip_norm", "max_length")
BEST = {"packing": 4096, "remat": "q,k,v,attention,o"}  # a third less memory than "matmuls", for 6 % of the time


def cases(setup: Setup) -> list[Case]:
    """Ours at its best, the reference's way, PEFT at its best, and ours padded as the reference pads."""
    require_torch("training")
    exported, config = setup.exported, setup.steps
    other = {
        "model": exported["model"],
        "adapter": exported["adapter"],
        "steps": exported["steps"],
        "config": {name: getattr(config, name) for name in _OF_OTHERS},
        "threads": setup.threads,
        "dtype": setup.model["dtype"],
        "precision": setup.model["matmul_precision"],
    }
    contenders = [
        ours("br_jax", setup, **BEST),
        Contender("PEFT, padded to max_length", HERE / "torch_training.py", "padded", other),
        Contender("PEFT, padded to the longest", HERE / "torch_training.py", "lean", other),
        ours("br_jax, padded to max_length", setup, **{**BEST, "packing": 0}),
    ]
    return [
        Case(
            "training",
            f"one optimizer step (forward, backward, clip, AdamW) of {describe(setup)}; PEFT with sdpa attention on "
            f"{setup.threads} threads (bf16 products by autocast), as the reference does and, padded to the longest "
            f"row, at its best: logits at answers alone, no mask; 4N FLOPs a token (frozen base: 2N forward, 2N back "
            f"to the activations)",
            contenders,
            "token",
            lambda outcomes: same_losses(outcomes, tolerance(setup)),
            flops=4 * exported["params"],
            device=exported["device"],
        )
    ]


def describe(setup: Setup) -> str:
    """The protocol in words."""
    config = setup.steps
    return (
        f"{setup.model['source']}, {setup.model['dtype']}, products in {setup.model['matmul_precision']}, "
        f"r {config.rank} on {'/'.join(config.targets)}, dropout {config.dropout}, {config.batch_size} rows of at most "
        f"{config.max_length} tokens, template {setup.model['template']}, tokens without padding"
    )


def ours(name: str, setup: Setup, buffer: bool = False, rival: str = "", **changes) -> Contender:
    """A contender that trains with the protocol and some changes of it; see `train`."""
    arguments = {
        "model": setup.model,
        "rows": setup.train_rows,
        "config": dataclasses.replace(setup.steps, **changes),
        "buffer": buffer,
        "rival": rival,
    }
    return Contender(name, HERE / "training.py", "train", arguments)


def tolerance(setup: Setup) -> float:
    """How far two losses of the same batch may be apart: sums in another order, and rounding to the dtype."""
    return 1e-3 if setup.model["matmul_precision"] == "float32" else 3e-2


def same_losses(outcomes: dict[str, list[float]], tolerance: float) -> list[str]:
    """Says how far the losses are apart.

    Raises:
        UserError: on the first batch, where nothing was trained yet, they differ by more than `tolerance`.
    """
    losses = np.array(list(outcomes.values()))  # [contenders, units]
    first, spread = losses[:, 0], np.ptp(losses, axis=0)
    told = ", ".join(f"{name} {loss:.6f}" for name, loss in zip(outcomes, first, strict=True))
    if not spread[0] <= tolerance:
        raise UserError(
            f"benchmark: the losses of the first batch differ by {spread[0]:.2g}: not the same work: {told}"
        )
    return [f"loss of the first batch: {told}", f"losses differ by at most {spread.max():.1e} in {len(spread)} steps"]


def train(model: dict, rows: list[Row], config: TrainConfig, buffer: bool, rival: str = ""):
    """A contender's work: step i on batch i, its outcome the loss.

    Args:
        model: arguments of `load_model`.
        rows: as many as `config.steps` steps take.
        config: all there is to say of how to train.
        buffer: whether a (random, small) Buffer is attached, as `config.frozen` says.
        rival: in `DEFENCES`, whose objective takes the place of the rows' loss; its streams are the same rows.
    """
    base = load_model(**model)
    examples, _ = encode_rows(rows, base.tokenizer, base.template, config.max_length)
    mesh = make_mesh()
    objective = DEFENCES[rival]() if rival else Objective()
    stage, hyper = Stage.of(base.decoder, config, mesh, objective), Hyper.of(config)
    rates = learning_rates(config, config.steps)
    adapter = first_adapter("user", "user", base, config)
    frozen = {"buffer": _random_adapter(base, config)} if buffer else {}
    frozen = frozen_collections(base.params, frozen, config.frozen)
    if rival and "direction" in objective.needs:
        frozen["aux"] = {"direction": collection(_random_adapter(base, config))}
    frozen = shard(frozen, mesh)
    state = shard(init_state(trainable_adapter(adapter), config.seed, objective), mesh)
    del base, adapter
    batches = list(step_batches(examples, config, mesh))
    if rival:
        streams = [kind for kind in ("refusals", "harmful", "benign") if kind in objective.needs]
        batches = [batch | {"streams": {kind: batch for kind in streams}} for batch in batches]
    batches = [on_mesh(batch, mesh) for batch in batches]
    order = dataclasses.replace(config, packing=0, buckets=())  # tokens of a step's rows, whatever is shared of them
    tokens = [int((batch["segment_ids"] > 0).sum()) for batch in step_batches(examples, order, mesh)]
    jax.set_mesh(mesh)
    for batch in batches:  # every shape is compiled beforehand
        train_step.lower(stage, state, frozen, batch, hyper).compile()

    def unit(index: int):
        nonlocal state
        state, metrics = train_step(stage, state, frozen, batches[index], hyper._replace(learning_rate=rates[index]))
        return tokens[index], float(metrics["loss"])

    return unit


def _random_adapter(base: Model, config: TrainConfig) -> Adapter:
    """One of the trained adapter's shapes that changes the model a little; it shares no array with it."""
    drawn = first_adapter("buffer", "buffer", base, config)
    return drawn.replace(weights={path: pair | {"b": pair["b"] + 1e-3} for path, pair in drawn.weights.items()})
