"""A model as the rest of the project sees it: spec, frozen params, tokenizer, and where they came from."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import Guard, warn_unguarded
from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError
from br_jax.core.records import fingerprint, key_of
from br_jax.models.decoder import Decoder, decoder_of
from br_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen base model; nothing in br_jax ever writes to its params."""

    spec: ModelSpec
    params: dict  # the tree of `models.decoder`, in the compute dtype
    tokenizer: PreTrainedTokenizerFast
    name: str  # what an adapter's config calls its base
    template: str  # "alpaca" or "chat", see `data.templates`
    fingerprint: str  # SHA-256 of spec and params, by which adapters know their base
    stop_tokens: tuple[int, ...]  # ids that end an answer; the tokenizer's EOS is one of them
    matmul_precision: str = "float32"  # of the programs that run it, see `models.kernels`
    cast: str = ""  # the dtype that the params were rounded to after the fingerprint was taken
    guard: Guard | None = None  # what adapters that leave are held against; None where no Buffer is at hand

    @property
    def decoder(self) -> Decoder:
        """The module that runs the params where they lie, but for what training changes of it."""
        return decoder_of(self.spec, self.params, self.matmul_precision)

    @property
    def dtype(self) -> str:
        """Of the params."""
        return str(self.params["embed"]["embedding"].dtype)

    @property
    def key(self) -> str:
        """What the model's answers are kept under: its fingerprint, and in what it computes where that is not f32."""
        precision = self.matmul_precision.removeprefix("float32")
        return "/".join(filter(None, (precision, self.cast, self.fingerprint)))

    @functools.cached_property
    def spelling(self) -> str:
        """A hash of how rows become tokens, and where an answer ends."""
        words = self.tokenizer.backend_tokenizer.to_str()
        return key_of(self.template, str(self.tokenizer.chat_template), words, self.stop_tokens)


def make_model(
    spec: ModelSpec,
    params: dict,
    tokenizer,
    name: str,
    template: str,
    stop_tokens: Sequence[int] = (),
    matmul_precision: str = "float32",
) -> Model:
    """A `Model` with its fingerprint taken from the content."""
    stops = tuple(dict.fromkeys(stop for stop in (tokenizer.eos_token_id, *stop_tokens) if stop is not None))
    return Model(spec, params, tokenizer, name, template, fingerprint(params, spec.to_json()), stops, matmul_precision)


def fold_adapter(model: Model, adapter: Adapter, name: str) -> Model:
    """A new model with an adapter added into its weights, in f32 and rounded once to their dtype; `refuse_adapter`."""
    refuse_adapter(model, adapter, name)
    params = lora.fold(model.params, adapter)
    changed = fingerprint(params, model.spec.to_json())
    return dataclasses.replace(model, params=params, name=name, fingerprint=changed, cast="")


def cast_model(model: Model, dtype: str) -> Model:
    """The same model with its params rounded to a dtype; adapters still know it as the one that they were made for."""
    if model.dtype == dtype:
        return model
    params = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))(model.params)
    return dataclasses.replace(model, params=params, cast=dtype)


def guard(model: Model, *buffers: Adapter) -> Model:
    """The aligned base with a guard: adapters and models that leave from here on are held against these Buffers.

    A model that is loaded from a provider's folder has one already.

    Raises:
        UserError: no Buffer, an adapter that is none, one that changes nothing, or one of another base.
    """
    if not buffers:
        raise UserError("guard: no Buffer was given, so nothing would be refused: give guard(model, buffer)")
    for buffer in buffers:
        require_buffer(model, buffer, "guard")
        lora.validate(buffer, model.params)
    made = Guard.of(model.params, buffers)
    if not all(any(np.any(pair["a"]) for pair in jax.device_get(one.weights).values()) for one in made.references):
        raise UserError("guard: this Buffer changes nothing, so nothing would be refused: give one that was trained")
    return dataclasses.replace(model, guard=made)


# Each of these raises a `UserError` that begins with the place where a model or an adapter goes.


def require_model(model: Model, place: object) -> None:
    """Refuses anything but a `Model`."""
    if not isinstance(model, Model):
        raise UserError(f"{place}: needs a Model, got {type(model).__name__}: br.load_model reads one")


def refuse_adapter(model: Model, adapter: Adapter, place: object) -> None:
    """Refuses an adapter that must neither go into a model nor leave with it.

    That is a Buffer, by its roles or, where the model has a guard, by its numbers; one that nobody has said what it is;
    one of another base, or that does not fit it; and one that is not finite.
    """
    require_model(model, place)
    lora.require_adapter(adapter, place)
    lora.refuse_buffer(place, adapter.roles)
    lora.require_base(adapter, model.fingerprint, place)
    lora.validate(adapter, model.params)
    if model.guard is not None:
        model.guard.refuse(place, adapter)


def require_releasable(model: Model, adapter: Adapter, place: object) -> None:
    """As `refuse_adapter`, of what is handed on; a warning says where its numbers could not be looked at."""
    refuse_adapter(model, adapter, place)
    if model.guard is None:
        warn_unguarded(place)


def require_buffer(model: Model, buffer: Adapter, place: str) -> None:
    """Refuses anything but a Buffer of this very base, and one of its guard's, if it has a guard."""
    require_model(model, place)
    lora.require_adapter(buffer, place)
    if buffer.roles != ("buffer",):
        raise UserError(f"{place}: needs the Buffer, got an adapter made of {', '.join(buffer.roles) or 'nothing'}")
    if not buffer.base:
        raise UserError(f'{place}: this Buffer does not say for which base it was made: load it with the role "buffer"')
    lora.require_base(buffer, model.fingerprint, place)
    if model.guard is not None and lora.fingerprint(buffer) not in model.guard.fingerprints:
        raise UserError(f"{place}: this is not the Buffer of the provider's folder that the model came from")
