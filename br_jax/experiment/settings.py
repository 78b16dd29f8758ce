"""Which numbers a config may have, and what its settings must be to each other, to the model and to the mesh."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax.adapters.merge import MergeConfig
from br_jax.attackers.registry import ATTACKERS, attacker_of
from br_jax.core.bounds import BATCH, ROWS, SEED, SHARE, TOKENS, Bound, bounds_of, require
from br_jax.core.errors import UserError, one_line
from br_jax.core.mesh import batch_parts
from br_jax.defences.registry import DEFENCES
from br_jax.models.precision import resolve_precision
from br_jax.models.spec import ModelSpec
from br_jax.scoring.judges.registry import JUDGES
from br_jax.scoring.suite import Suite
from br_jax.training.config import TrainConfig, require_fit

TRAINED = ("pretrain", "align", "buffer", "reinforce", "user")  # the config's parts that have a `train`
_OTHERS = {"attackers": ATTACKERS, "defences": DEFENCES}  # the config's parts that hold settings of each of many
_ADD = "add it to br_jax/experiment/settings.py"
_AXIS = Bound(-1, 1 << 20)  # of a mesh; -1 is what is left, and 0 no mesh has
# A judge's settings, whichever of them it has.
_JUDGE = {"max_length": TOKENS, "batch_size": BATCH, "threshold": Bound(0.0, 1.0, open_low=True, open_high=True)}

# Path of a config's number -> its bounds; those of `model.spec` are `ModelSpec`'s own.
BOUNDS: dict[str, Bound] = {
    "seed": SEED,
    **{f"mesh.{axis}": _AXIS for axis in ("data", "fsdp", "tensor")},
    "data.texts.n": ROWS,
    "data.rows.validation_share": SHARE._replace(open_high=True),
    "data.rows.test_share": SHARE._replace(open_high=True),
    "pretrain.rows": ROWS,
    "distill.answer_tokens": TOKENS,
    "distill.spare": Bound(0.0, 100.0),
    **{f"{stage}.{rows}": ROWS for stage in ("align", "reinforce") for rows in ("refusals", "benign")},
    "buffer.harmful": ROWS,
    "buffer.refused": SHARE,
    "user.n": ROWS._replace(low=1),
    "user.harmful_share": SHARE,
    "user.probes": ROWS,
    "calibrate.harmful": ROWS,
    "calibrate.benign": ROWS,
    "calibrate.answer_tokens": TOKENS,
    **{f"judges.{judge}.{setting}": bound for judge in JUDGES for setting, bound in _JUDGE.items()},
    **{f"eval.{part}": ROWS for part in ("topic", "task", "benign", "health")},
    **{f"eval.{setting}": bound for setting, bound in bounds_of(Suite).items()},
    **{f"{stage}.train.{setting}": bound for stage in TRAINED for setting, bound in bounds_of(TrainConfig).items()},
    **{f"merge.{setting}": bound for setting, bound in bounds_of(MergeConfig).items()},
    **{
        f"{whose}.{name}.{setting}": bound
        for whose, kinds in _OTHERS.items()
        for name, kind in kinds.items()
        for setting, bound in bounds_of(kind).items()
    },
}


def settled(config: ConfigDict) -> ConfigDict:
    """A copy of a config that says what this machine will do: `model.matmul_precision` "auto" is one of the others.

    So a workdir that is moved to a machine that would do something else is refused, instead of mixing both.
    """
    config = config.copy_and_resolve_references()
    config.model.matmul_precision = resolve_precision(config.model.matmul_precision, config.model.dtype)
    return config


def check_settings(config: ConfigDict) -> None:
    """Finds numbers of a config that are out of bounds, and settings that contradict each other.

    Raises:
        UserError: naming the setting: "align.train.rank is -1: it must be ..."; also for a number that has no bounds.
    """
    for path, value in _leaves(config.to_dict()):
        if path.startswith("model.spec."):
            continue
        if path in BOUNDS:
            require(path, value, BOUNDS[path])
        elif any(map(_is_number, value if isinstance(value, tuple | list) else [value])):
            cure = "give its field a bound, `br_jax.core.bounds.number`" if path.partition(".")[0] in _OTHERS else _ADD
            raise UserError(f"{path} is {value}: nothing says what it may be: {cure}")
    for stage in TRAINED:
        _made(f"{stage}.train.", TrainConfig, config[stage].train)
    if config.model.spec:
        _made("model.spec.", ModelSpec, config.model.spec)
    for whose, kinds in _OTHERS.items():
        for name, kind in kinds.items():
            _made(f"{whose}.{name}.", kind, config[whose][name])
    counts = config.calibrate.harmful, config.calibrate.benign
    if any(counts) and not all(counts):
        raise UserError(f"calibrate.harmful, calibrate.benign: {counts}: set both above 0, or both to 0")


def check_sizes(config: ConfigDict, spec: ModelSpec, mesh: Mesh) -> None:
    """Finds what asks more than the model's sizes, or the devices, can give, a user's as its kind asks for them.

    Raises:
        UserError: as `training.config.require_fit`, for every stage that will be trained; a batch that the mesh does
            not split; answers that are longer than the model's context.
    """
    attacker = attacker_of(config)
    rows = {
        "pretrain": config.pretrain.rows,
        "align": config.align.refusals + config.align.benign,
        "buffer": config.buffer.harmful,
        "reinforce": config.reinforce.refusals + config.reinforce.benign,
        "user": attacker.size(config.user.n) // attacker.jobs,
    }
    given = {stage for stage in ("align", "buffer", "reinforce") if config[stage].adapter}
    given |= {"pretrain"} if config.model.source else set()
    given |= set() if rows["align"] else {"align"}  # the model is aligned as it comes
    for stage in (stage for stage in TRAINED if stage not in given):
        train, owner = config[stage].train.to_dict(), f"{stage}.train."
        train = TrainConfig(**(attacker.settings(train, config.user.n) if stage == "user" else train))
        require_fit(train, spec, rows[stage], adapter=stage != "pretrain", owner=owner)
        if not train.packing and train.batch_size % ((parts := batch_parts(mesh)) * train.accumulation):
            told = f" in {train.accumulation} micro-batches" if train.accumulation > 1 else ""
            raise UserError(
                f"{owner}batch_size is {train.batch_size}{told}: {parts} devices must divide it, or set packing"
            )
    for path in ("distill.answer_tokens", "calibrate.answer_tokens", "eval.answer_tokens", "eval.task_tokens"):
        part, setting = path.split(".")
        if config[part][setting] >= spec.max_length:
            told = f"the model's context is {spec.max_length:,} tokens, the prompt's among them"
            raise UserError(f"{path} is {config[part][setting]}: {told}")


def _made(owner: str, kind: type, settings: Mapping[str, Any]) -> None:
    """Makes a dataclass of a part of the config; what that raises is one line with its owner."""
    try:
        kind(**settings)
    except UserError as error:
        raise UserError(f"{owner}{error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{owner.removesuffix('.')}: {one_line(error)}") from error


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
