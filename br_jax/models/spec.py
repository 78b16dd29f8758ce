"""What distinguishes one model from another, in one small frozen dataclass."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder (Llama family: RMSNorm, rope, GQA, SwiGLU).

    Hashable, so that it can be a static argument of a jitted function.

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

    @property
    def num_params(self) -> int:
        """N: every param of the model."""
        layer = sum(math.prod(shape) for shape in self.kernel_shapes.values()) + 2 * self.embed_dim
        unembedding = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
        return self.num_layers * layer + self.vocab_size * self.embed_dim + unembedding + self.embed_dim

    @property
    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each matmul of a layer."""
        D, F = self.embed_dim, self.ffw_dim
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (D, heads),
            "k": (D, kv),
            "v": (D, kv),
            "o": (heads, D),
            "gate": (D, F),
            "up": (D, F),
            "down": (F, D),
        }

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rope needs pairs")
