"""What distinguishes one model from another, in one small frozen dataclass."""

import dataclasses
import json
from dataclasses import MISSING

from br_jax.core.bounds import number, require_bounds
from br_jax.core.errors import UserError, one_line

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
MAX_LENGTH = 10**9  # tokens: no model's context is as long


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's longer context: slow rotations are slowed by `factor`, fast ones stay, those between are mixed."""

    factor: float = number(MISSING, 1, 10**6, kind=float)  # by which the context grew
    # A wave of more than original_length / low_freq_factor tokens is slow, of less than original_length /
    # high_freq_factor fast; the second factor is the larger one.
    low_freq_factor: float = number(MISSING, 0, 10**6, open_low=True, kind=float)
    high_freq_factor: float = number(MISSING, 0, 10**6, open_low=True, kind=float)
    original_length: int = number(MISSING, 1, MAX_LENGTH)  # the context before, in tokens

    def __post_init__(self):
        require_bounds(self, "rope_scaling")
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise UserError(f"rope_scaling: high_freq_factor is {high}: it must be above low_freq_factor, {low}")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder (RMSNorm, rope, grouped-query attention, gated feed-forward layer).

    The defaults of the switches are Llama's. Hashable, so that it can be a static argument of a jitted function. A
    `UserError` where a number is out of its bound (the tops are beyond any real model), or fields do not go together.
    """

    vocab_size: int = number(MISSING, 1, 10**7)  # V, rows of the embedding
    embed_dim: int = number(MISSING, 1, 10**6)  # D, width of the residual stream
    num_layers: int = number(MISSING, 1, 1000)  # L
    num_heads: int = number(MISSING, 1, 10**4)  # N, query heads
    num_kv_heads: int = number(MISSING, 1, 10**4)  # K, key and value heads; divides N (grouped-query attention)
    head_dim: int = number(MISSING, 2, 10**4)  # H, even; N * H need not equal D
    ffw_dim: int = number(MISSING, 1, 10**7)  # F, width of the gated feed-forward layer
    rope_theta: float = number(10000.0, 1, 10**12, kind=float)  # base of the rotary frequencies
    norm_eps: float = number(1e-5, 0, 1, open_low=True, kind=float)  # of every RMSNorm
    tie_embeddings: bool = True  # the output head is the embedding itself
    max_length: int = number(2048, 1, MAX_LENGTH)  # longest context that the model was trained for, in tokens
    model_type: str = "llama"  # the maker's name of the family, as in config.json
    rope_scaling: RopeScaling | None = None
    biases: tuple[str, ...] = ()  # which of `KERNELS` have a bias
    qk_norm: bool = False  # each head's queries and keys are RMS-normed before rope
    post_norms: bool = False  # attention's and the feed-forward layer's outputs are normed too, before they are added
    norm_plus_one: bool = False  # norms multiply by 1 + weight, in f32, and only then round to the compute dtype
    activation: str = "silu"  # of the gate; or "gelu_tanh"
    scale_embeddings: bool = False  # embeddings are multiplied by sqrt(D), rounded to the compute dtype
    # Of the scores before the softmax; None is H^-0.5.
    query_scale: float | None = number(None, 0, 1, open_low=True, kind=float)
    # Scores, and logits, become cap * tanh(x / cap).
    attention_soft_cap: float | None = number(None, 0, 10**6, open_low=True, kind=float)
    logit_soft_cap: float | None = number(None, 0, 10**6, open_low=True, kind=float)
    # A query sees itself and the window - 1 tokens before it, in the layers of `windowed`.
    window: int | None = number(None, 1, MAX_LENGTH)
    windowed: tuple[bool, ...] = ()  # for each layer, whether it has the window; empty for all of them

    def __post_init__(self):
        require_bounds(self)
        for field in dataclasses.fields(self):
            if field.type is bool and type(value := getattr(self, field.name)) is not bool:
                raise UserError(f"{field.name} is {value!r}: it must be True or False")
        try:  # a config file, or JSON, gives dicts and lists
            if not isinstance(self.rope_scaling, RopeScaling | None):
                object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
            for name in ("biases", "windowed"):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        except TypeError as error:
            raise UserError(f"rope_scaling, biases or windowed is of a wrong kind: {one_line(error)}") from error
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rope needs pairs")
        if unknown := set(self.biases) - set(KERNELS):
            raise UserError(f"biases {sorted(map(str, unknown))} are none of {', '.join(KERNELS)}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise UserError(f"activation {self.activation!r}: silu or gelu_tanh")
        if not all(type(has_window) is bool for has_window in self.windowed):
            raise UserError(f"windowed is {one_line(self.windowed)}: it must be True or False for each layer")
        if self.windowed and (self.window is None or len(self.windowed) != self.num_layers):
            raise UserError(f"windowed says {len(self.windowed)} layers of {self.num_layers}, window {self.window}")

    @property
    def window_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it has the window."""
        return self.windowed or (self.window is not None,) * self.num_layers

    @property
    def num_params(self) -> int:
        """N: every param of the model."""
        D, shapes = self.embed_dim, self.kernel_shapes
        layer = sum(a * b for a, b in shapes.values()) + sum(shapes[name][1] for name in self.biases)
        layer += (4 if self.post_norms else 2) * D + (2 * self.head_dim if self.qk_norm else 0)
        return self.num_layers * layer + self.vocab_size * D * (1 if self.tie_embeddings else 2) + D

    @property
    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each matmul of a layer."""
        D, F = self.embed_dim, self.ffw_dim
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = ((D, heads), (D, kv), (D, kv), (heads, D), (D, F), (D, F), (F, D))
        return dict(zip(KERNELS, shapes, strict=True))

    def to_json(self) -> str:
        """The spec, canonically; what is at its default is left out, so that a new switch changes no older model's."""
        values = dataclasses.asdict(self)
        changed = [field.name for field in dataclasses.fields(self) if values[field.name] != field.default]
        return json.dumps({name: values[name] for name in changed}, sort_keys=True)
