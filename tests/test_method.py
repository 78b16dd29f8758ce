"""The method's stages on a tiny model: what is frozen, what is trained, and what may leave the provider."""

import inspect
import json
import stat

import jax
import numpy as np
import pytest

import br_jax as br
from br_jax.adapters import lora
from br_jax.training import run


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, rows, quick):
    """Every stage's adapter, with the bytes of base and Buffer from before they were attached."""
    folder = tmp_path_factory.mktemp("method")
    provider = folder / "provider"
    base = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tiny.params)]
    config = quick()
    buffer = br.train_buffer(tiny, rows, config, workdir=provider)
    kept = jax.tree.map(np.array, buffer)
    reinforce = br.train_reinforce(tiny, buffer, rows[:8], rows[8:], config, workdir=provider)
    user = br.train_user(tiny, rows, config, buffer=buffer, workdir=folder)
    sft = br.train_user(tiny, rows, config, workdir=folder)
    jax.tree.map(np.testing.assert_array_equal, buffer, kept)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tiny.params)] == base
    return {"folder": folder, "buffer": buffer, "reinforce": reinforce, "user": user, "sft": sft}


def equal(one, other):
    assert one.roles == other.roles
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differ(one, other):
    return any(
        (a != b).any() for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(other.weights), strict=True)
    )


def test_roles_say_where_an_adapter_came_from(made):
    roles = {name: made[name].roles for name in ("buffer", "reinforce", "user", "sft")}
    assert roles == {"buffer": ("buffer",), "reinforce": ("reinforce",), "user": ("user",), "sft": ("user",)}


def test_the_buffer_is_attached_where_the_method_says(made, tiny):
    """What a stage was trained over is in its record: Buffer for reinforce and user, nothing for buffer and sft."""
    hashes = {name: run.lora.fingerprint(made[name]) for name in ("buffer", "reinforce", "user", "sft")}
    for name, place in (("buffer", "provider"), ("reinforce", "provider"), ("user", "."), ("sft", ".")):
        stage = json.loads((made["folder"] / place / name / "stage.json").read_text())
        inputs = stage["inputs"]
        assert stage["output"] == hashes[name] and inputs["base"] == tiny.fingerprint
        assert inputs.get("buffer") == (hashes["buffer"] if name in ("reinforce", "user") else None)
    assert differ(made["user"], made["sft"])


def test_sft_is_the_user_stage_without_buffer(made, tiny, rows, quick):
    equal(made["sft"], run.train_adapter("sft", "user", tiny, rows, quick()))
    equal(made["sft"], br.train_user(tiny, rows, quick(), buffer=None))


def test_the_user_s_stage_sees_nothing_of_reinforce():
    assert "reinforce" not in inspect.signature(br.train_user).parameters
    assert "buffer" not in inspect.signature(br.release).parameters


def test_a_jsonl_file_is_as_good_as_its_rows(made, tiny, rows, quick, tmp_path):
    records = [{"prompt": row.turns[0][1], "response": row.turns[1][1]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    equal(made["sft"], br.train_user(tiny, tmp_path / "rows.jsonl", quick()))
    equal(made["sft"], br.train_user(tiny, str(tmp_path / "rows.jsonl"), quick(), workdir=made["folder"]))


def test_the_provider_s_folder_is_its_own(made):
    provider = made["folder"] / "provider"
    assert stat.S_IMODE(provider.stat().st_mode) == 0o700
    for name in ("buffer", "reinforce"):
        adapter = provider / name / "adapter"
        assert stat.S_IMODE(adapter.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in adapter.iterdir()} == {0o600}
    assert not list(made["folder"].glob("user/**/*buffer*"))


def test_release_is_recomputed_from_base_user_and_reinforce_alone(made, tiny, tmp_path):
    folder = made["folder"]
    released = br.release(tiny, made["user"], made["reinforce"])
    br.save_adapter(tmp_path / "first", released, tiny)
    user = br.load_adapter(folder / "user" / "adapter", tiny)
    reinforce = br.load_adapter(folder / "provider" / "reinforce" / "adapter", tiny)
    again = br.release(tiny, user, reinforce)
    br.save_adapter(tmp_path / "again", again, tiny)
    equal(released, again)
    assert released.roles == ("reinforce", "user")
    file = "adapter_model.safetensors"
    assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert stat.S_IMODE((tmp_path / "first").stat().st_mode) & 0o700 == 0o700
    equal(released, br.load_adapter(tmp_path / "first", tiny))
    equal(released, br.qr_merge(made["user"], made["reinforce"]))


def test_whatever_holds_a_buffer_is_neither_released_nor_saved(made, tiny, tmp_path):
    buffer, user, reinforce = made["buffer"], made["user"], made["reinforce"]
    stacks = [buffer, lora.stack([user, buffer]), lora.stack({"x": buffer}), lora.scaled(buffer, 0.0)]
    for tainted in stacks:
        assert "buffer" in tainted.roles
        for pair in ((tainted, reinforce), (user, tainted)):
            with pytest.raises(br.UserError, match=r"buffer.*never released"):
                br.release(tiny, *pair)
        with pytest.raises(br.UserError, match="holds a buffer"):
            br.save_adapter(tmp_path / "leak", tainted, tiny)
        with pytest.raises(br.UserError, match="holds a buffer"):
            br.qr_merge(tainted, reinforce)
    assert not list(tmp_path.iterdir())


def test_release_wants_each_adapter_in_its_place(made, tiny):
    with pytest.raises(br.UserError, match="expected the user adapter, got one made of reinforce"):
        br.release(tiny, made["reinforce"], made["user"])
    with pytest.raises(br.UserError, match="expected the reinforce adapter, got one made of reinforce, user"):
        br.release(tiny, made["user"], br.release(tiny, made["user"], made["reinforce"]))


def test_release_refuses_adapters_of_another_model(made, make_tiny, make_adapter):
    other = make_tiny(ffw_dim=24)
    with pytest.raises(br.UserError, match="made for another model"):
        br.release(other, made["user"], made["reinforce"])


def test_detach_leaves_the_same_objects(made):
    adapters = {"buffer": made["buffer"], "user": made["user"]}
    left = br.detach(adapters)
    assert list(left) == ["user"] and left["user"] is made["user"] and list(adapters) == ["buffer", "user"]
    equal(lora.stack(left), lora.stack([made["user"]]))
    with pytest.raises(br.UserError, match="no adapter named 'bufer' to detach; near: buffer"):
        br.detach(adapters, "bufer")


def test_what_teaches_a_base_to_refuse_is_not_released(tiny, made, make_adapter):
    with pytest.raises(br.UserError, match="expected the user adapter, got one made of align"):
        br.release(tiny, make_adapter("align"), made["reinforce"])
