"""The schedule against transformers'; accumulation and packing; what is and is not differentiated."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiles

from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh
from br_jax.data.batches import encode_rows, make_batches, make_packed_batches, normalize_per_example
from br_jax.method import train_user
from br_jax.models.decoder import Decoder
from br_jax.training.config import TrainConfig
from br_jax.training.loop import SingleRun
from br_jax.training.step import Stage, Step, init_state, learning_rates, trainable_adapter

torch = pytest.importorskip("torch", reason="the oracle of the schedule")
from transformers import get_cosine_schedule_with_warmup  # noqa: E402


@pytest.fixture(scope="module")
def batches(tiny, rows, quick):
    examples, _ = encode_rows(rows, tiny.tokenizer, tiny.template, 40)
    return make_batches(examples, batch_size=8, seed=1, buckets=(40,), steps=6)


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


@functools.partial(jax.jit, static_argnums=0)
def compiled(program, *arrays):
    return Step(*program, *arrays).gradient()


def gradient_of(model, config, adapter, batch, key=None):
    """(loss, gradients) of a batch, with the adapter trained over the base alone."""
    program = Decoder(model.spec, config.dropout), config.accumulation, config.loss_chunk
    return compiled(program, trainable_adapter(adapter), {"params": model.params}, batch, adapter.scale, key)


@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.0), (7, 0.05), (100, 0.05), (20, 0.15), (3, 1.0)])
def test_the_schedule_is_transformers(steps, ratio):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    theirs = get_cosine_schedule_with_warmup(optimizer, int(np.ceil(np.float64(steps) * ratio)), steps)
    found = learning_rates(TrainConfig(learning_rate=0.25, warmup_ratio=ratio), steps)
    assert found.dtype == np.float32
    for rate in found:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-7)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("steps", "lengths"), [(10, (4, 3, 3)), (2, (1, 1))])
def test_each_cycle_has_the_schedule_of_a_run_of_its_length(steps, lengths):
    config = TrainConfig(learning_rate=0.25, warmup_ratio=0.3)
    found = learning_rates(dataclasses.replace(config, cycles=3), steps)
    np.testing.assert_array_equal(found, np.concatenate([learning_rates(config, length) for length in lengths]))


def test_a_cycle_begins_with_a_fresh_optimizer(tiny, make_adapter, batches, quick):
    """Two cycles are two runs, the second from where the first has ended."""
    config, mesh = quick(cycles=2), make_mesh(devices=jax.devices()[:1])
    stage, adapter = Stage.of(tiny.decoder, config, mesh), make_adapter("user")
    frozen = {"params": tiny.params}

    def fresh(trainable):
        return init_state(jax.tree.map(jnp.copy, trainable), 0)

    def run(state, config, batches):
        loop = SingleRun("run", stage, state, frozen, batches, config, mesh)
        return loop.fit()[0]

    found = run(fresh(trainable_adapter(adapter)), config, batches[:4])
    once = dataclasses.replace(config, cycles=1)
    half = run(fresh(trainable_adapter(adapter)), once, batches[:2])
    expected = run(fresh(half), once, batches[2:4])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected)
    through = run(fresh(trainable_adapter(adapter)), once, batches[:4])
    assert not np.allclose(jax.tree.leaves(through)[0], jax.tree.leaves(found)[0], atol=1e-4)


def test_accumulation_changes_nothing(tiny, make_adapter, batches, quick):
    """The mean is over the answer tokens of the batch, though the micro-batches hold unequal numbers of them."""
    adapter, batch = make_adapter("user", seed=1), on_device(batches[0])  # of eight, farthest from where f32 rounds
    batch["weights"] = batch["weights"].at[:2].set(0)  # one micro-batch of four has no answer at all
    (loss, grads), (split_loss, split_grads) = (
        gradient_of(tiny, quick(accumulation=parts), adapter, batch) for parts in (1, 4)
    )
    assert float(split_loss) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), split_grads, grads)
    batch["weights"] *= 0
    loss, grads = gradient_of(tiny, quick(), adapter, batch)
    assert float(loss) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))


def assert_same(found, expected):
    """Losses alike, and gradients up to rounding of the largest entry of a matrix."""
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found[1], expected[1])


@pytest.mark.parametrize("length", [128, pytest.param(512, marks=pytest.mark.slow)])  # attention: "xla", "blocked"
def test_packing_changes_no_loss_and_no_gradient(tiny, make_adapter, quick, length):
    """200 rows, as long as GSM8K's in SmolLM2's tokens (97 to 512, mean 217), or a quarter of that."""
    rng, adapter, config = np.random.default_rng(0), make_adapter("user"), quick(max_length=length, loss_chunk=256)
    lengths = np.clip(rng.lognormal(np.log(0.4), 0.32, 200), 0.19, 1) * length
    examples = [
        {"tokens": rng.integers(0, 256, n, dtype=np.int32), "answer": np.arange(n) >= n // 2}
        for n in lengths.astype(int)
    ]
    order = {"batch_size": config.batch_size, "seed": 1, "steps": 2}
    padded = make_batches(examples, buckets=(length,), **order)
    packed = make_packed_batches(examples, length=length, **order)
    for pair in zip(packed, padded, strict=True):
        assert len(pair[0]["tokens"]) < len(pair[1]["tokens"]), "nothing was packed here"
        assert pair[0]["weights"].sum() == pair[1]["weights"].sum()
        # f32 sums in another order: an entry is off by rounding of the largest of its matrix, not of its own size
        assert_same(*(gradient_of(tiny, config, adapter, on_device(batch)) for batch in pair))


def mean_over(examples, gradient_of_one):
    """The mean of the losses and gradients of examples, each by itself."""
    found = [gradient_of_one(example) for example in examples]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_count_alike_whatever_the_lengths_of_their_answers(tiny, make_adapter, rows, quick, packing):
    adapter, some = make_adapter("user"), encode_rows(rows[:8], tiny.tokenizer, tiny.template, 40)[0]
    assert len({int(one["answer"].sum()) for one in some}) > 1

    def of(examples, make=make_batches, shape=None):
        batch = make(examples, batch_size=len(examples), seed=0, **(shape or {"buckets": (40,)}))[0]
        return gradient_of(tiny, quick(), adapter, on_device(batch))

    shape = (make_packed_batches, {"length": 128, "unit": 32}) if packing else ()
    assert_same(of(normalize_per_example(some), *shape), mean_over(some, lambda one: of([one])))


def test_dropout_is_redrawn_every_step_and_repeats_with_the_seed(tiny, make_adapter, batches, quick):
    adapter, batch = make_adapter("user"), on_device(batches[0])
    loss = lambda key: gradient_of(tiny, quick(dropout=0.5), adapter, batch, key)[0]  # noqa: E731
    key = jax.random.key(0)
    first, second, again = (float(loss(jax.random.fold_in(key, step))) for step in (0, 1, 0))
    assert first == again != second


def test_a_second_user_traces_and_compiles_nothing(tiny, rows, quick, make_adapter):
    buffer = make_adapter("buffer")
    first = quick(steps=0, epochs=1)
    train_user(tiny, rows[:8], first, buffer=buffer)
    second = dataclasses.replace(first, epochs=3, learning_rate=3e-3, warmup_ratio=0.5, weight_decay=0.1, clip_norm=0.5)
    with Compiles() as made:
        train_user(tiny, rows, second, buffer=buffer)
    assert not made.names and not made.traced


def test_wrong_settings_are_named(quick):
    for change, message in (
        ({"rank": 0}, "rank is 0"),
        ({"accumulation": 3}, "accumulation is 3: it must divide batch_size 8"),
        ({"steps": 0, "epochs": 0}, "epochs is 0: it must be a whole number from 1"),
        ({"frozen": "melt"}, "frozen is 'melt'.*stack, fold"),
        ({"packing": 39}, "packing is 39: a row of max_length 40 must fit in"),
        ({"attention": "splosh"}, "'splosh'.*auto, xla"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"same_start": "yes"}, "same_start is 'yes': it must be True or False"),
    ):
        with pytest.raises(UserError, match=message):
            quick(**change)
