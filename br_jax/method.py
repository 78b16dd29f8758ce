"""Buffer-and-Reinforce in one page (Ham, Jang, Lee, Kim, ICML 2026, arXiv 2605.24550).

With theta the aligned base, and L the mean cross-entropy at the answers of rows:

    B = argmin L(theta + B;     harmful -> harmful answer)                     `train_buffer`
    R = argmin L(theta + B + R; harmful -> refusal, benign -> answer)          `train_reinforce`, B frozen
    U = argmin L(theta + B + U; the user's rows, some of them harmful)         `train_user`, B frozen
    theta + scale (U + R (I - a Q Q^T))     Q spans what U writes to           `release`, B left out

With Buffer attached the model is already at the floor of the harmful loss, so harmful rows have no gradient left to
give; without it the base is what it was, since nothing ever wrote to it.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping

from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import warn_unguarded
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.adapters.peft import load_adapter
from br_jax.core.errors import UserError
from br_jax.data.rows import Rows, as_rows
from br_jax.models.model import Model, refuse_adapter, require_buffer
from br_jax.training.config import TrainConfig
from br_jax.training.jobs import Job, Outcome
from br_jax.training.pool import Pool
from br_jax.training.run import train_adapter

Path = str | os.PathLike


def train_buffer(
    model: Model,
    harmful: Rows,
    config: TrainConfig | None = None,
    *,
    name: str = "buffer",
    workdir: Path | None = None,
    mesh: Mesh | None = None,
    probes: Mapping[str, Rows] | None = None,
) -> Adapter:
    """Trains BufferLoRA: the removable jailbreak. Once, by the provider; it never leaves the provider's folder.

    Args:
        model: the aligned base.
        harmful: rows of harmful prompts with harmful answers, or the JSONL file that holds them.
        config: hyper-parameters; the default is the reference's protocol.
        name: of the run and its folder.
        workdir, mesh, probes: see `training.run.train_adapter`.
    """
    _require(model=model, config=config, name=name)
    run = {"workdir": workdir, "mesh": mesh, "probes": probes}
    return train_adapter(name, "buffer", model, as_rows(harmful), config or TrainConfig(), provider=True, **run)


def train_reinforce(
    model: Model,
    buffer: Adapter | Path,
    refusals: Rows,
    benign: Rows,
    config: TrainConfig | None = None,
    *,
    name: str = "reinforce",
    workdir: Path | None = None,
    mesh: Mesh | None = None,
    probes: Mapping[str, Rows] | None = None,
) -> Adapter:
    """Trains ReinforceLoRA: recovers refusals from the jailbroken state. Once, by the provider.

    Args:
        buffer: BufferLoRA of this base or its folder, attached and frozen.
        refusals: rows of harmful prompts with refusals (or a JSONL file).
        benign: rows of benign prompts with answers (or a JSONL file).
        model, config, name, workdir, mesh, probes: as in `train_buffer`.

    Raises:
        UserError: `buffer` is no Buffer, or one of another base.
    """
    _require(model=model, config=config, name=name)
    rows = [*as_rows(refusals), *as_rows(benign)]
    run = {"workdir": workdir, "mesh": mesh, "probes": probes, "frozen": {"buffer": _buffer_of(model, buffer, name)}}
    return train_adapter(name, "reinforce", model, rows, config or TrainConfig(), provider=True, **run)


def train_user(
    model: Model,
    rows: Rows,
    config: TrainConfig | None = None,
    *,
    buffer: Adapter | Path | None = None,
    undefended: bool = False,
    name: str = "",
    workdir: Path | None = None,
    mesh: Mesh | None = None,
    probes: Mapping[str, Rows] | None = None,
) -> Adapter:
    """Trains a user's LoRA on a user's rows, whatever they are, beside Buffer, which is no part of it.

    Args:
        rows: the user's rows, or the user's JSONL file.
        buffer: BufferLoRA of this base or its folder, attached and frozen.
        undefended: in its place, trains without a defence (plain SFT), as an experiment needs it.
        name: of the run and its folder; the default is "user", or "sft" where undefended.
        model, config, workdir, mesh, probes: as in `train_buffer`.

    Raises:
        UserError: neither Buffer nor `undefended`, or both; `buffer` is no Buffer, or one of another base.
    """
    frozen = _frozen(model, config, buffer, undefended, name or "train_user")
    name = name or ("sft" if undefended else "user")
    run = {"workdir": workdir, "mesh": mesh, "probes": probes}
    return train_adapter(name, "user", model, as_rows(rows), config or TrainConfig(), frozen=frozen, **run)


def train_users(
    model: Model,
    jobs: Mapping[str, Rows] | Iterable[Job],
    config: TrainConfig | None = None,
    *,
    buffer: Adapter | Path | None = None,
    undefended: bool = False,
    slots: int = 8,
    workdir: Path | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Outcome]:
    """Trains many users' LoRAs side by side, each as `train_user` would by itself.

    A user's adapter is the same as of `train_user` with the same rows, settings and seed, to the order of sums (and,
    with dropout, its masks). What one user hands in touches no other: neither rows without end, nor a loss of NaN. The
    same jobs in the same order give the same adapters, to the bit.

    Args:
        model, buffer, undefended, mesh: as in `train_user`.
        jobs: each user's rows by name, or `Job`s, which may have settings of their own; they wait in this order.
        config: settings of all jobs; its rank and max_length are the most that one may have.
        slots: users that are trained at once; memory goes with it.
        workdir: where a stopped call goes on; each job's run is the folder workdir/NAME/user.

    Yields:
        Each job's `Outcome` as it ends: its adapter, or one line that says why there is none.

    Raises:
        UserError: as `train_user`, of what is not a job's own; and slots that the mesh does not divide.
        Stopped: SIGTERM came.
    """
    frozen = _frozen(model, config, buffer, undefended, "train_users")
    jobs = itertools.starmap(Job, jobs.items()) if isinstance(jobs, Mapping) else jobs
    pool = Pool(model, config or TrainConfig(), frozen=frozen, slots=slots, workdir=workdir, mesh=mesh)
    return itertools.chain.from_iterable(pool.train(jobs))


def release(model: Model, user: Adapter, reinforce: Adapter, merge: MergeConfig | None = None) -> Adapter:
    """What the user gets: Reinforce QR-merged into User; a function of (base, user, reinforce) alone.

    Args:
        model: the aligned base that both were trained on, by `train_user` and `train_reinforce`.
        merge: how they are merged; the default is the paper's.

    Returns:
        One adapter of rank R_U + R_R with roles ("reinforce", "user").

    Raises:
        UserError: when either is, or has in it, anything but a user's and a Reinforce adapter of this base; by its
            numbers too, where the model has a guard (a warning says where it has none).
    """
    _require(model=model, user=user, reinforce=reinforce, merge=merge)
    require_parts(model, user, reinforce)
    if model.guard is None:
        warn_unguarded("release")
    return qr_merge(user, reinforce, merge)


def require_parts(model: Model, user: Adapter, reinforce: Adapter) -> None:
    """Raises a `UserError` where two adapters are not those that `release` merges."""
    for adapter, role in ((user, "user"), (reinforce, "reinforce")):
        if adapter.roles != (role,):
            raise UserError(
                f"release: expected the {role} adapter, got one made of {', '.join(adapter.roles) or 'nothing'}: "
                "Buffer and what holds it are never released"
            )
        lora.validate(adapter, model.params)
        refuse_adapter(model, adapter, "release")


def _frozen(model: Model, config, buffer: Adapter | Path | None, undefended: bool, name: str) -> dict[str, Adapter]:
    """What a user's training is beside: Buffer, or nothing where that was asked for."""
    _require(model=model, config=config, undefended=undefended, name=name)
    if (buffer is not None) == undefended:
        wrong = (
            "both buffer= and undefended=True" if undefended else "no Buffer, so these rows could undo the alignment"
        )
        raise UserError(f"{name}: {wrong}: give buffer=..., or undefended=True alone for plain SFT")
    return {} if buffer is None else {"buffer": _buffer_of(model, buffer, name)}


def _buffer_of(model: Model, buffer: Adapter | Path, name: str) -> Adapter:
    if isinstance(buffer, Path):
        buffer = load_adapter(buffer, model.params, fingerprint=model.fingerprint, role="buffer")
    _require(buffer=buffer)
    require_buffer(model, buffer, name)
    return buffer


_KINDS = {
    "model": (Model, "give what br.load_model(path) returns"),
    "config": (TrainConfig | None, "give a br.TrainConfig"),
    "merge": (MergeConfig | None, "give a br.MergeConfig"),
    "undefended": (bool, "give True or False"),
    "name": (str, "give a text"),
    "buffer": (Adapter, "give a Buffer, or the path of its folder"),
    **dict.fromkeys(("user", "reinforce"), (Adapter, "give what br.load_adapter(path, model) returns")),
}


def _require(**given: object) -> None:
    """The check at the edge: a `UserError` for an argument of another kind, and a name that is no folder's."""
    for name, value in given.items():
        kind, cure = _KINDS[name]
        if not isinstance(value, kind):
            raise UserError(f"{name} is a {type(value).__name__}: {cure}")
    if "name" in given and not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,200}", given["name"]):
        raise UserError(f"name is {given['name']!r}: it must be the name of one folder, at most 200 characters")
