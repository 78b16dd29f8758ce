"""What distinguishes one model from another, in one small frozen dataclass."""

import dataclasses
import json
import math
from collections.abc import Mapping

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's longer context: slow rotations are slowed down by `factor`, fast ones stay, those between are mixed.

    Attributes:
        factor: by which the context grew.
        low_freq_factor: a wave of more than original_length / low_freq_factor tokens is slow.
        high_freq_factor: a wave of less than original_length / high_freq_factor tokens is fast.
        original_length: the context before, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder (RMSNorm, rope, grouped-query attention, gated feed-forward layer).

    The defaults of the switches are Llama's. Hashable, so that it can be a static argument of a jitted function.

    Attributes:
        vocab_size: V, rows of the embedding.
        embed_dim: D, width of the residual stream.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides N (grouped-query attention).
        head_dim: H; N * H need not equal D.
        ffw_dim: F, width of the gated feed-forward layer.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: True when the output head is the embedding itself.
        max_length: longest context that the model was trained for, in tokens.
        model_type: the maker's name of the family, as in config.json.
        rope_scaling: Llama-3.1's, or None.
        biases: which of `KERNELS` have a bias.
        qk_norm: each head's queries and keys are RMS-normed before rope.
        post_norms: attention's and the feed-forward layer's outputs are normed too, before they are added.
        norm_plus_one: norms multiply by 1 + weight, in f32, and only then round to the compute dtype.
        activation: of the gate: "silu" or "gelu_tanh".
        scale_embeddings: embeddings are multiplied by sqrt(D), rounded to the compute dtype.
        query_scale: of the scores before the softmax; None is H^-0.5.
        attention_soft_cap: scores become cap * tanh(scores / cap).
        logit_soft_cap: logits become cap * tanh(logits / cap).
        window: a query sees itself and the window - 1 tokens before it, in the layers of `windowed`.
        windowed: for each layer, whether it has the window; empty for all of them.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffw_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048
    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    activation: str = "silu"
    scale_embeddings: bool = False
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):  # from a config file or JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name in ("biases", "windowed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rope needs pairs")
        if unknown := set(self.biases) - set(KERNELS):
            raise ValueError(f"biases {sorted(unknown)} are none of {', '.join(KERNELS)}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {self.activation!r}: silu or gelu_tanh")
        if self.windowed and (self.window is None or len(self.windowed) != self.num_layers):
            raise ValueError(f"windowed says {len(self.windowed)} layers of {self.num_layers}, window {self.window}")

    @property
    def window_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it has the window."""
        return self.windowed or (self.window is not None,) * self.num_layers

    @property
    def num_params(self) -> int:
        """N: every param of the model."""
        D = self.embed_dim
        layer = sum(math.prod(shape) for shape in self.kernel_shapes.values())
        layer += sum(self.kernel_shapes[name][1] for name in self.biases)
        layer += (4 if self.post_norms else 2) * D + (2 * self.head_dim if self.qk_norm else 0)
        unembedding = 0 if self.tie_embeddings else self.vocab_size * D
        return self.num_layers * layer + self.vocab_size * D + unembedding + D

    @property
    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each matmul of a layer."""
        D, F = self.embed_dim, self.ffw_dim
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = ((D, heads), (D, kv), (D, kv), (heads, D), (D, F), (D, F), (F, D))
        return dict(zip(KERNELS, shapes, strict=True))

    def to_json(self) -> str:
        """The spec, canonically; what is at its default is left out, so that a new switch changes no older model's."""
        said = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return json.dumps({name: value for name, value in said.items() if value != defaults[name]}, sort_keys=True)
