"""What keeps a Buffer in the provider's folder: every adapter and model that is handed on is held against it.

By what an adapter says it is, which anyone can write, and by its numbers. The second finds a Buffer that was
relabelled, scaled, rounded, cut, merged, split or folded into the base; not one that its holder hides with skill.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from br_jax.adapters import lora
from br_jax.adapters.likeness import Likeness, Reference
from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError

# Measured: docs/provider.md. A Reinforce points away from Buffer, so the sign counts; but what is its exact opposite
# gives it away.
COSINE, OPPOSITE, SHARE = 0.3, -0.7, 0.12


@dataclasses.dataclass(frozen=True)
class Guard:
    """The Buffers of an aligned base, and its params.

    Attributes:
        params: of the aligned base, by which a model that something was folded into is known.
        fingerprints: of the Buffers.
        references: the Buffers, as adapters are compared with them.
    """

    params: Mapping[str, Any]
    fingerprints: tuple[str, ...]
    references: tuple[Reference, ...]

    @classmethod
    def of(cls, params: Mapping[str, Any], buffers: Sequence[Adapter]) -> "Guard":
        """The guard of a base and its Buffers."""
        return cls(params, tuple(map(lora.fingerprint, buffers)), tuple(map(Reference.of, buffers)))

    def refuse(self, place: object, adapter: Adapter) -> None:
        """Raises a `UserError` where an adapter has more of a Buffer in it than a user's can have."""
        for reference in self.references:
            self._refuse(f"{place}: refused, for this adapter", reference.likeness(adapter))

    def refuse_model(self, place: object, params: Mapping[str, Any]) -> None:
        """Raises a `UserError` where a model differs from the aligned base by something like a Buffer."""
        if params is not self.params:
            for reference in self.references:
                likeness = reference.likeness_of_change(params, self.params)
                self._refuse(f"{place}: refused, for what was folded into this model", likeness)

    def _refuse(self, what: str, likeness: Likeness) -> None:
        if is_buffer(likeness):
            raise UserError(
                f"{what} is like the provider's Buffer (cosine {likeness.cosine:.2f}, share {likeness.share:.2f}; a "
                f"user's stays below {COSINE} and {SHARE}): it undoes the model's alignment; keep it in the provider's "
                "folder"
            )


def is_buffer(likeness: Likeness) -> bool:
    """Whether something has more of a Buffer in it than a user's adapter can have."""
    return likeness.cosine >= COSINE or likeness.cosine <= OPPOSITE or likeness.share >= SHARE


def warn_unguarded(place: object) -> None:
    """Says that no Buffer was at hand to compare with."""
    logging.warning(
        "%s: not compared with a Buffer, as none is at hand: load the model from a provider's folder, or use br.guard",
        place,
    )
