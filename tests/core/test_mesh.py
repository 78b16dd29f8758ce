"""The table: every leaf has its place, wrong meshes are refused, and a split changes no loss."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from br_jax.adapters import lora
from br_jax.core.errors import UserError
from br_jax.core.io import read_jsonl
from br_jax.core.mesh import leaf_name, make_mesh, shard, shardings
from br_jax.data.batches import encode_rows, make_batches
from br_jax.training.run import train_adapter
from br_jax.training.step import Hyper, Stage, init_state, train_step, trainable_adapter

P = PartitionSpec
ROWS = ("data", "fsdp")


def named(tree):
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def parts(make_tiny, make_adapter, rows, quick):
    """What a step takes: state, frozen, batch."""
    model = make_tiny(tie_embeddings=False)
    examples, _ = encode_rows(rows, model.tokenizer, model.template, 40)
    batch = make_batches(examples, batch_size=8, seed=0, buckets=(40,))[0]
    frozen = {"params": model.params, "lora": lora.collection(make_adapter("buffer", 1))}
    stage = Stage.of(model.decoder, quick(), make_mesh())
    return stage, Hyper.of(quick()), init_state(trainable_adapter(make_adapter("user")), 0), frozen, batch


def test_every_leaf_lies_where_the_table_says(parts):
    stage, hyper, *trees = parts
    mesh = make_mesh(2, 2, 2)
    expected = {
        "params/embed/embedding": P("tensor", "fsdp"),
        "params/head/kernel": P("fsdp", "tensor"),
        "params/layers/attn/q/kernel": P(None, "fsdp", "tensor"),
        "params/layers/attn/o/kernel": P(None, "tensor", "fsdp"),
        "params/layers/mlp_norm/scale": P(),
        "lora/layers/mlp/down/a": P(None, "tensor"),
        "lora/layers/mlp/down/b": P(None, None, "fsdp"),
        "trainable/lora_trainable/layers/attn/v/a": P(None, "fsdp"),
        "trainable/lora_trainable/layers/attn/v/b": P(None, None, "tensor"),
        "opt_state/1/0/mu/lora_trainable/layers/attn/v/b": P(None, None, "tensor"),
        "opt_state/1/0/nu/lora_trainable/layers/mlp/gate/a": P(None, "fsdp"),
        "step": P(),
        "key": P(),
        "tokens": P(ROWS),
        "weights": P(ROWS),
    }
    placed = [shard(tree, mesh) for tree in trees]
    with jax.set_mesh(mesh):
        after, _ = train_step(stage, *placed, hyper)
    seen = set()
    for tree in (*placed[1:], after):  # the state as the step gives it back, for the first was donated
        for name, leaf in named(tree).items():
            assert isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh, name
            if name in expected:
                assert leaf.sharding.spec == expected[name], name
                seen.add(name)
    assert seen == set(expected)
    table = {name: where for tree in trees for name, where in named(shardings(tree, mesh)).items()}
    for name, leaf in named(after).items():
        assert leaf.sharding == table[name], name  # equal, or the next step would be compiled anew


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers/attn/gates/kernel", (2, 2), r"no sharding rule for leaf layers/attn/gates/kernel with 2 axes"),
        ("embed/embedding", (2, 2, 2), r"leaf embed/embedding with 3 axes"),
        ("embed/embedding", (9, 8), r"embed/embedding: axis vocab of size 9 .* in 2 \(mesh axes tensor\)"),
        ("tokens", (10, 4), r"tokens: axis batch of size 10 .* in 4 \(mesh axes data, fsdp\)"),
    ],
)
def test_a_leaf_that_cannot_be_laid_out_is_named(name, shape, message):
    with pytest.raises(UserError, match=message):
        shardings({name: np.zeros(shape)}, make_mesh(2, 2, 2))


def test_a_mesh_that_does_not_fit_is_refused_and_one_size_may_be_left_open():
    for sizes in ((3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (8, 0, 1), (16, 1, 1)):
        with pytest.raises(UserError, match=r"does not fit 8 device"):
            make_mesh(*sizes)
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_split_changes_no_loss(tmp_path, tiny, make_adapter, rows, quick):
    """Of three steps with a Buffer attached."""
    losses = []
    for devices, sizes in ((1, (1, 1, 1)), (8, (2, 2, 2))):
        run = {"workdir": tmp_path / str(sizes), "mesh": make_mesh(*sizes, jax.devices()[:devices])}
        config = quick(steps=3, learning_rate=3e-3)
        train_adapter("user", "user", tiny, rows, config, frozen={"buffer": make_adapter("buffer")}, **run)
        losses.append([record["loss"] for record in read_jsonl(run["workdir"] / "user" / "metrics.jsonl")])
    assert len(set(losses[0])) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
