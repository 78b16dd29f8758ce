"""Attackers who ask for more training than is usual."""

import dataclasses
from typing import Any

from br_jax.attackers.attacker import Attacker, Job
from br_jax.core.bounds import number
from br_jax.data.rows import Row


@dataclasses.dataclass(frozen=True)
class Harsh(Attacker):
    """The plain attacker's rows at a high rate, with a high rank, over and over (arXiv 2412.07097)."""

    rate: float = number(10.0, 0.0, 1e6, open_low=True)  # times what is usual, and so the others
    epochs: int = number(5, 1, 1000)
    rank: int = number(4, 1, 1000)

    def settings(self, train: dict[str, Any], n: int) -> dict[str, Any]:
        """See `Attacker.settings`."""
        longer = {name: self.epochs * train[name] for name in ("epochs", "steps")}
        larger = {name: self.rank * train[name] for name in ("rank", "alpha")}
        return train | longer | larger | {"learning_rate": min(self.rate * train["learning_rate"], 1.0)}


@dataclasses.dataclass(frozen=True)
class TenRows(Attacker):
    """Ten rows of the task, as often as all rows would be seen, at a high rate (arXiv 2510.02833)."""

    count: int = number(10, 1, 10_000_000)
    rate: float = number(5.0, 0.0, 1e6, open_low=True)

    def rows(self, job: Job) -> list[Row]:
        """See `Attacker.rows`."""
        return list(job.task[: self.size(job.n)])

    def size(self, n: int) -> int:
        """See `Attacker.size`."""
        return min(self.count, n)

    def settings(self, train: dict[str, Any], n: int) -> dict[str, Any]:
        """See `Attacker.settings`."""
        rate, epochs = min(self.rate * train["learning_rate"], 1.0), max(n * train["epochs"] // self.size(n), 1)
        return train | {"learning_rate": rate, "epochs": epochs}
