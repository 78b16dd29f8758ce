"""The method's stages on a tiny model: what is frozen, what is trained, and what may leave the provider."""

import json
import stat

import jax
import numpy as np
import pytest
from contents import jsonl

import br_jax as br
from br_jax.adapters import lora
from br_jax.training import run


def equal(one, other):
    assert one.roles == other.roles
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_buffer_is_attached_where_the_method_says(organism, tiny):
    """What a stage was trained over is in its record: Buffer for reinforce and user, nothing for buffer and sft."""
    names = ("buffer", "reinforce", "user", "sft")
    assert [organism[name].roles for name in names] == [("buffer",), ("reinforce",), ("user",), ("user",)]
    hashes = {name: lora.fingerprint(organism[name]) for name in names}
    for name in names:
        place = organism["folder"] / ("provider" if name in ("buffer", "reinforce") else ".")
        stage = json.loads((place / name / "stage.json").read_text())
        assert stage["output"] == hashes[name] and stage["inputs"]["base"] == tiny.fingerprint
        assert stage["inputs"].get("buffer") == (hashes["buffer"] if name in ("reinforce", "user") else None)
    assert hashes["user"] != hashes["sft"]


def test_sft_is_the_user_stage_without_buffer_and_rows_are_rows_in_any_form(organism, tiny, rows, quick, tmp_path):
    file = tmp_path / "rows.jsonl"
    records = [{"prompt": row.turns[0][1], "response": row.turns[1][1]} for row in rows]
    file.write_bytes(jsonl(*records))
    equal(organism["sft"], run.train_adapter("sft", "user", tiny, rows, quick()))
    equal(organism["sft"], br.train_user(tiny, str(file), quick(), undefended=True))
    equal(organism["sft"], br.train_user(tiny, file, quick(), undefended=True, workdir=organism["folder"]))
    equal(organism["sft"], br.train_user(tiny, records, quick(), undefended=True, workdir=organism["folder"]))
    with pytest.raises(br.UserError, match=r"^rows\[2\]: 'response' is empty; fill it or delete the row$"):
        br.train_user(tiny, [*records[:2], {"prompt": "a", "response": ""}], quick(), undefended=True)


def test_arguments_of_another_kind_are_a_line_each_and_nothing_is_written(organism, tiny, rows, quick, tmp_path):
    buffer, user, reinforce = (organism[name] for name in ("buffer", "user", "reinforce"))
    inside = tmp_path / "inside"
    run = {"workdir": inside, "buffer": buffer}
    calls = [
        (f"undefended is a {kind}: give True or False", lambda v=v: br.train_user(tiny, rows, quick(), undefended=v))
        for v, kind in ((None, "NoneType"), ([], "list"), (0, "int"), ("yes", "str"))
    ]
    calls += [
        (r"name is .*: it must be the name of one", lambda n=n: br.train_user(tiny, rows, quick(), name=n, **run))
        for n in ("../x", str(tmp_path / "x"), "a/b", "..", ".x", "a\0b", "a\nb", "a\\b", "x" * 201)
    ]
    calls += [
        ("name is a int", lambda: br.train_buffer(tiny, rows, quick(), name=3, workdir=inside)),
        ("it must be the name", lambda: br.train_buffer(tiny, rows, quick(), name="", workdir=inside)),
        ("it must be the name", lambda: br.train_reinforce(tiny, buffer, rows, rows, name="../r", workdir=inside)),
        (r"model is a str: give what br.load_model", lambda: br.train_user("path/of/it", rows, **run)),
        (r"model is a dict: give", lambda: br.train_users({}, {"a": rows}, buffer=buffer)),
        ("config is a dict: give a br.TrainConfig", lambda: br.train_user(tiny, rows, {"rank": 3}, **run)),
        ("buffer is a dict: give a Buffer, or the path of its folder", lambda: br.train_user(tiny, rows, buffer={})),
        ("buffer is a dict", lambda: br.train_reinforce(tiny, {}, rows, rows, workdir=inside)),
        ("nowhere: no adapter there", lambda: br.train_user(tiny, rows, buffer=tmp_path / "nowhere", workdir=inside)),
        ("user is a dict: give what br.load_adapter", lambda: br.release(tiny, {}, reinforce)),
        ("reinforce is a PosixPath", lambda: br.release(tiny, user, tmp_path)),
        ("merge is a float", lambda: br.release(tiny, user, reinforce, 0.5)),
    ]
    for message, call in calls:
        with pytest.raises(br.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_a_buffer_is_taken_by_its_folder(organism, tiny, rows, quick):
    folder = organism["folder"]
    by_path = br.train_user(tiny, rows, quick(), buffer=str(folder / "provider" / "buffer" / "adapter"))
    equal(by_path, organism["user"])
    with pytest.raises(br.UserError, match="is user by its own account, not buffer"):
        br.train_user(tiny, rows, quick(), buffer=folder / "user" / "adapter")


def test_the_provider_s_folder_is_its_own(organism):
    provider = organism["folder"] / "provider"
    assert stat.S_IMODE(provider.stat().st_mode) == 0o700
    for name in ("buffer", "reinforce"):
        adapter = provider / name / "adapter"
        assert stat.S_IMODE(adapter.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in adapter.iterdir()} == {0o600}
    assert not list(organism["folder"].glob("user/**/*buffer*"))
    user = organism["folder"] / "user"  # not yet released
    assert {stat.S_IMODE(path.stat().st_mode) for path in (user / "adapter").iterdir()} == {0o600}


def test_release_is_recomputed_from_base_user_and_reinforce_alone(organism, tiny, tmp_path):
    folder = organism["folder"]
    released = br.release(tiny, organism["user"], organism["reinforce"])
    br.save_adapter(tmp_path / "first", released, tiny)
    user = br.load_adapter(folder / "user" / "adapter", tiny)
    reinforce = br.load_adapter(folder / "provider" / "reinforce" / "adapter", tiny)
    again = br.release(tiny, user, reinforce)
    br.save_adapter(tmp_path / "again", again, tiny)
    equal(released, again)
    assert released.roles == ("reinforce", "user")
    file = "adapter_model.safetensors"
    assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    equal(released, br.load_adapter(tmp_path / "first", tiny))
    equal(released, br.qr_merge(organism["user"], organism["reinforce"]))


def test_whatever_holds_a_buffer_is_neither_released_nor_saved(organism, tiny, tmp_path):
    buffer, user, reinforce = organism["buffer"], organism["user"], organism["reinforce"]
    for tainted in (buffer, lora.stack([user, buffer]), lora.scaled(buffer, 0.0)):
        for pair in ((tainted, reinforce), (user, tainted)):
            with pytest.raises(br.UserError, match=r"buffer.*never released"):
                br.release(tiny, *pair)
        with pytest.raises(br.UserError, match="holds a buffer"):
            br.save_adapter(tmp_path / "leak", tainted, tiny)
        with pytest.raises(br.UserError, match="holds a buffer"):
            br.qr_merge(tainted, reinforce)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("user", "reinforce", "message"),
    [
        ("reinforce", "user", "expected the user adapter, got one made of reinforce:"),
        ("user", "released", "expected the reinforce adapter, got one made of reinforce, user"),
        ("align", "reinforce", "expected the user adapter, got one made of align"),
    ],
)
def test_release_wants_each_adapter_in_its_place(organism, tiny, make_adapter, user, reinforce, message):
    adapters = organism | {
        "align": make_adapter("align"),
        "released": lora.stack([organism["user"], organism["reinforce"]]),
    }
    with pytest.raises(br.UserError, match=message):
        br.release(tiny, adapters[user], adapters[reinforce])


def test_release_refuses_adapters_of_another_model(organism, make_tiny):
    with pytest.raises(br.UserError, match="made for another model"):
        br.release(make_tiny(ffw_dim=24), organism["user"], organism["reinforce"])


def test_detach_leaves_the_same_objects(organism):
    adapters = {"buffer": organism["buffer"], "user": organism["user"]}
    left = br.detach(adapters)
    assert list(left) == ["user"] and left["user"] is organism["user"] and list(adapters) == ["buffer", "user"]
    equal(lora.stack(left), lora.stack([organism["user"]]))
    with pytest.raises(br.UserError, match="no adapter named 'bufer' to detach; near: buffer"):
        br.detach(adapters, "bufer")
