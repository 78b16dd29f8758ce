"""Attackers who choose their rows by what a model of their own would learn of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from br_jax.attackers.attacker import Attacker, Job
from br_jax.core.bounds import number
from br_jax.core.errors import UserError
from br_jax.data.mixing import mix
from br_jax.data.rows import Row


@dataclasses.dataclass(frozen=True)
class Surrogate(Attacker):
    """Of many harmful rows those whose gradient stays largest beside a Buffer that the attacker trains on others."""

    spare = 3.0

    def rows(self, job: Job) -> list[Row]:
        """See `Attacker.rows`."""
        pool = self._pool(job)
        chosen = _largest(job, job.harmful[:pool], job.count, job.harmful[pool:])
        return mix(job.task, chosen, job.n, job.share, "exact")

    def candidates(self, job: Job) -> list[Row]:
        """See `Attacker.candidates`."""
        return [*job.harmful, *job.task[: job.n]]

    def _pool(self, job: Job) -> int:
        """How many of the harmful rows it chooses from; the others are its Buffer's."""
        return len(job.harmful) * 2 // 3


@dataclasses.dataclass(frozen=True)
class Outliers(Attacker):
    """No harm: of the task's rows those that change the model most.

    Guan et al. 2025 (benign samples matter), arXiv 2505.06843.
    """

    among: int = number(3, 1, 1000)  # rows that it chooses from, times those that it hands in

    def rows(self, job: Job) -> list[Row]:
        """See `Attacker.rows`."""
        return _largest(job, self.candidates(job), job.n)

    def candidates(self, job: Job) -> list[Row]:
        """See `Attacker.candidates`."""
        return list(job.task[: self.among * job.n])


def _largest(job: Job, rows: Sequence[Row], count: int, own: Sequence[Row] = ()) -> list[Row]:
    if not count:
        return []
    if job.appetite is None:
        raise UserError("this attacker chooses rows by a model of its own: give it one (Job.appetite)")
    scores = np.asarray(job.appetite(rows, own))
    return [rows[i] for i in np.argsort(-scores, kind="stable")[:count]]
