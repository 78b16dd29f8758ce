"""Buffer-and-Reinforce in one page (Ham, Jang, Lee, Kim, ICML 2026, arXiv 2605.24550).

| stage     | frozen        | trained       | rows                                          |
|-----------|---------------|---------------|-----------------------------------------------|
| buffer    | base          | BufferLoRA    | harmful prompt -> harmful answer              |
| reinforce | base + Buffer | ReinforceLoRA | harmful prompt -> refusal, benign -> answer   |
| user      | base + Buffer | UserLoRA      | the user's, some of them harmful              |
| release   |               |               | Buffer left out, Reinforce QR-merged into User |

With Buffer attached the model is already at the floor of the harmful loss, so harmful rows have no gradient left to
give; without it the base is what it was, since nothing ever wrote to it.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping

from br_jax.adapters import lora
from br_jax.adapters.guard import warn_unguarded
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.core.errors import UserError
from br_jax.data.rows import Rows, as_rows
from br_jax.models.model import Model, refuse_adapter, require_buffer
from br_jax.training.config import TrainConfig
from br_jax.training.jobs import Job, Outcome
from br_jax.training.pool import Pool
from br_jax.training.run import train_adapter


def train_buffer(
    model: Model, harmful: Rows, config: TrainConfig | None = None, *, name: str = "buffer", **run
) -> Adapter:
    """Trains BufferLoRA: the removable jailbreak. Once, by the provider; it never leaves the provider's folder.

    Args:
        model: the aligned base.
        harmful: rows of harmful prompts with harmful answers, or the JSONL file that holds them.
        config: hyper-parameters; the default is the reference's protocol.
        name: of the run and its folder.
        **run: workdir, mesh, probes: see `training.run.train_adapter`.

    Returns:
        The adapter, with role "buffer".
    """
    return train_adapter(name, "buffer", model, as_rows(harmful), config or TrainConfig(), provider=True, **run)


def train_reinforce(
    model: Model,
    buffer: Adapter,
    refusals: Rows,
    benign: Rows,
    config: TrainConfig | None = None,
    *,
    name: str = "reinforce",
    **run,
) -> Adapter:
    """Trains ReinforceLoRA: recovers refusals from the jailbroken state. Once, by the provider.

    Args:
        model: the aligned base.
        buffer: BufferLoRA, attached and frozen.
        refusals: rows of harmful prompts with refusals (or a JSONL file).
        benign: rows of benign prompts with answers (or a JSONL file).
        config, name, **run: as in `train_buffer`.

    Returns:
        The adapter, with role "reinforce".

    Raises:
        UserError: `buffer` is no Buffer, or one of another base.
    """
    require_buffer(model, buffer, name)
    run = {"frozen": {"buffer": buffer}, "provider": True, **run}
    rows = [*as_rows(refusals), *as_rows(benign)]
    return train_adapter(name, "reinforce", model, rows, config or TrainConfig(), **run)


def train_user(
    model: Model,
    rows: Rows,
    config: TrainConfig | None = None,
    *,
    buffer: Adapter | None = None,
    undefended: bool = False,
    name: str = "",
    **run,
) -> Adapter:
    """Trains a user's LoRA on a user's rows, whatever they are, beside Buffer.

    Args:
        model: the aligned base.
        rows: the user's rows, or the user's JSONL file.
        config, **run: as in `train_buffer`.
        buffer: BufferLoRA of this base, attached and frozen.
        undefended: in its place, trains without a defence (plain SFT), as an experiment needs it.
        name: of the run and its folder; the default is "user", or "sft" where undefended.

    Returns:
        The adapter, with role "user". Buffer is no part of it.

    Raises:
        UserError: neither Buffer nor `undefended`, or both; `buffer` is no Buffer, or one of another base.
    """
    name, frozen = name or ("sft" if undefended else "user"), _beside(model, buffer, undefended, name or "train_user")
    return train_adapter(name, "user", model, as_rows(rows), config or TrainConfig(), frozen=frozen, **run)


def train_users(
    model: Model,
    jobs: Mapping[str, Rows] | Iterable[Job],
    config: TrainConfig | None = None,
    *,
    buffer: Adapter | None = None,
    undefended: bool = False,
    slots: int = 8,
    **run,
) -> Iterator[Outcome]:
    """Trains many users' LoRAs side by side, each as `train_user` would by itself.

    A user's adapter is the same as of `train_user` with the same rows, settings and seed, to the order of sums (and,
    with dropout, its masks). What one user hands in touches no other: neither rows without end, nor a loss of NaN.

    Args:
        model, buffer, undefended: as in `train_user`.
        jobs: each user's rows by name, or `Job`s, which may have settings of their own; they wait in this order.
        config: settings of all jobs; its rank and max_length are the most that one may have.
        slots: users that are trained at once; memory goes with it.
        **run: workdir, where a stopped call goes on (each job's run is the folder workdir/NAME/user), and mesh.

    Yields:
        Each job's `Outcome` as it ends: its adapter, or one line that says why there is none.

    Raises:
        UserError: as `train_user`, of what is not a job's own; and slots that the mesh does not divide.
        Stopped: SIGTERM came.
    """
    frozen = _beside(model, buffer, undefended, "train_users")
    named = jobs.items() if isinstance(jobs, Mapping) else None
    jobs = (Job(name, rows) for name, rows in named) if named is not None else jobs
    pool = Pool(model, config or TrainConfig(), frozen=frozen, slots=slots, **run)
    return itertools.chain.from_iterable(pool.train(jobs))


def _beside(model: Model, buffer: Adapter | None, undefended: bool, name: str) -> dict[str, Adapter]:
    """What a user's training is beside: Buffer, or nothing where that was asked for."""
    if (buffer is not None) == undefended:
        said = "both buffer= and undefended=True" if undefended else "no Buffer, so these rows could undo the alignment"
        raise UserError(f"{name}: {said}: give buffer=..., or undefended=True alone for plain SFT")
    if buffer is None:
        return {}
    require_buffer(model, buffer, name)
    return {"buffer": buffer}


def release(model: Model, user: Adapter, reinforce: Adapter, merge: MergeConfig | None = None) -> Adapter:
    """What the user gets: Reinforce QR-merged into User; a function of (base, user, reinforce) alone.

    Args:
        model: the aligned base that both were trained on.
        user: from `train_user`.
        reinforce: from `train_reinforce`.
        merge: how they are merged; the default is the paper's.

    Returns:
        One adapter of rank R_U + R_R with roles ("reinforce", "user").

    Raises:
        UserError: when either is, or has in it, anything but a user's and a Reinforce adapter of this base; by its
            numbers too, where the model has a guard (a warning says where it has none).
    """
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
