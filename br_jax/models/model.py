"""A model as the rest of the project sees it: spec, frozen params, tokenizer, and where they came from."""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.hashes import fingerprint
from br_jax.models.decoder import Decoder
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
    matmul_precision: str = "float32"  # of the programs that run it, see `models.precision`

    @property
    def decoder(self) -> Decoder:
        """The module that runs the params, but for what training changes of it."""
        return Decoder(self.spec, matmul_precision=self.matmul_precision)

    @property
    def key(self) -> str:
        """What the model's answers are kept under: its fingerprint, and its precision where that is not f32."""
        return self.fingerprint if self.matmul_precision == "float32" else f"{self.matmul_precision}/{self.fingerprint}"


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
    eos = tokenizer.eos_token_id
    stops = tuple(dict.fromkeys([*([] if eos is None else [eos]), *stop_tokens]))
    made = fingerprint(params, spec.to_json())
    return Model(spec, params, tokenizer, name, template, made, stops, matmul_precision)


def fold_adapter(model: Model, adapter: Adapter, name: str) -> Model:
    """A new model with an adapter added into its weights (in f32, rounded once to their dtype)."""
    params = lora.fold(model.params, adapter)
    made = fingerprint(params, model.spec.to_json())
    return dataclasses.replace(model, params=params, name=name, fingerprint=made)
