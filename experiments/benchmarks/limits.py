"""What the machine can do: products of a model's shapes by precision, and copies. What a step could reach at best."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import HERE, Setup
from benchmarks.pairing import Contender
from benchmarks.report import Case
from br_jax.models.io.load import read_spec
from br_jax.models.kernels import turned_product

ROWS = (1, 16, 64, 448, 2048)  # a decoded token, batches of them, a packed row, a prefill
KINDS = ("f32", "bf16", "f32, W left", "bf16, W left")
_FLOPS, _BYTES = 2e9, 2e8  # of one measurement, at least


def cases(setup: Setup) -> list[Case]:
    """One process, which measures each shape alone."""
    spec = read_spec(setup.model["source"])
    wide = spec.num_heads * spec.head_dim
    shapes = {"q": (spec.embed_dim, wide), "up": (spec.embed_dim, spec.ffw_dim), "down": (spec.ffw_dim, spec.embed_dim)}
    shapes["head"] = spec.embed_dim, spec.vocab_size
    how = (
        f"GFLOP/s of rows x [in, out] at {setup.model['source']}'s shapes, sums in f32 whatever is multiplied, and as "
        "W^T x^T (`turned_product`); GB/s of a copy, read and written; the best of five"
    )
    measured = Contender("machine", HERE / "limits.py", "measure", {"shapes": shapes})
    return [Case("limits", how, [measured], "GFLOP", lambda outcomes: table(outcomes["machine"][-1]))]


def table(rates: dict) -> list[str]:
    """The rates as lines: a shape and a number of rows each."""
    lines = [f"copy: {rates['copy']:.1f} GB/s", f"{'':>28}" + "".join(f"{kind:>14}" for kind in KINDS)]
    for (name, rows), found in rates["products"].items():
        lines.append(f"{name + f', {rows} rows':>28}" + "".join(f"{found[kind]:>14.0f}" for kind in KINDS))
    return lines


def measure(shapes: dict[str, tuple[int, int]]):
    """A contender's work: every rate; its outcome {"products": {(name, rows): {kind: GFLOP/s}}, "copy": GB/s}."""

    def unit(index: int):
        products, done = {}, 0.0
        for name, (fan_in, fan_out) in shapes.items():
            for rows in ROWS:
                times = max(1, int(_FLOPS / (2 * rows * fan_in * fan_out)))
                products[name, rows] = {kind: _rate(kind, rows, fan_in, fan_out, times) for kind in KINDS}
                done += len(KINDS) * 2e-9 * rows * fan_in * fan_out * times
        return done, {"copy": _copy(), "products": products}

    return unit


def _rate(kind: str, rows: int, fan_in: int, fan_out: int, times: int) -> float:
    precision, _, turned = kind.partition(", ")
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[precision]
    x = jax.random.normal(jax.random.key(0), (times, rows, fan_in))
    w = jax.random.normal(jax.random.key(1), (fan_out, fan_in) if turned else (fan_in, fan_out)).astype(dtype)

    @jax.jit
    def run(x, w):
        def add(total, each):
            y = turned_product(each, w) if turned else jnp.matmul(each.astype(dtype), w, preferred_element_type=x.dtype)
            return total + jax.lax.optimization_barrier(y)[0, 0], None

        return jax.lax.scan(add, jnp.float32(0), x)[0]

    return 2e-9 * rows * fan_in * fan_out * times / _best(run, x, w)


def _copy() -> float:
    x = jnp.zeros(int(_BYTES / 4), jnp.float32)
    return 2e-9 * x.nbytes / _best(jax.jit(lambda x: x + 1), x)


def _best(run, *arguments) -> float:
    """Seconds of the fastest of five calls, after one that compiles."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.min(seconds[1:]))
