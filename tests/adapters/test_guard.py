"""A Buffer in disguise leaves by no door, and a user's adapter by all of them."""

import dataclasses

import numpy as np
import pytest
from disguises import DISGUISES, as_user

import br_jax as br
from br_jax.adapters import lora
from br_jax.models.model import fold_adapter
from br_jax.scoring.suite import Suite


@pytest.fixture(params=DISGUISES)
def disguised(request, organism, make_adapter):
    """A Buffer that says that it is a user's adapter."""
    buffer = make_adapter("buffer", seed=3, rank=4)
    user = make_adapter("user", seed=4)
    return buffer, as_user(DISGUISES[request.param](buffer.replace(roles=("user",)), user))


def test_a_disguised_buffer_leaves_by_no_door(tiny, disguised, make_adapter, tmp_path):
    buffer, adapter = disguised
    model, reinforce = br.guard(tiny, buffer), make_adapter("reinforce", seed=9)
    doors = {
        "release": lambda: br.release(model, adapter, reinforce),
        "release as Reinforce": lambda: br.release(model, make_adapter("user"), adapter.replace(roles=("reinforce",))),
        "calibrate": lambda: br.calibrate(model, adapter, reinforce, ["a"], ["b"]),
        "save": lambda: br.save_adapter(tmp_path / "save", adapter, model),
        "export": lambda: br.export_adapter(model, adapter, tmp_path / "export"),
        "export at a lower rank": lambda: br.export_adapter(model, adapter, tmp_path / "rank", rank=1),
        "export a model": lambda: br.export_model(model, adapter, tmp_path / "model"),
        "fold": lambda: fold_adapter(model, adapter, "served"),
        "evaluate": lambda: br.evaluate(model, Suite(), adapter),
    }
    for door, leave in doors.items():
        with pytest.raises(br.UserError, match="like the provider's Buffer") as error:
            leave()
        assert "\n" not in str(error.value), door
    hidden = dataclasses.replace(model, params=lora.fold(model.params, adapter))
    with pytest.raises(br.UserError, match="folded into this model is like the provider's Buffer"):
        br.export_model(hidden, None, tmp_path / "folded")
    with pytest.raises(br.UserError, match="folded into this model is like the provider's Buffer"):
        br.export_model(hidden, make_adapter("user"), tmp_path / "folded")
    assert not [*tmp_path.iterdir()]


def test_half_in_the_base_and_half_in_the_adapter(tiny, make_adapter, tmp_path):
    buffer = make_adapter("buffer", seed=3, rank=4)
    half, model = as_user(lora.scaled(buffer, 0.15)), br.guard(tiny, buffer)
    with_half = dataclasses.replace(model, params=lora.fold(model.params, half))
    mixed = lora.stack([lora.scaled(half, 0.9), make_adapter("user")])
    model.guard.refuse_model("the half", lora.fold(model.params, make_adapter("user", seed=4)))
    with pytest.raises(br.UserError, match="folded into this model"):
        br.export_model(with_half, mixed, tmp_path / "to")


def test_what_users_train_leaves_by_every_door(tiny, organism, tmp_path):
    """Also where the Buffer is not at hand, which is said."""
    buffer, reinforce = organism["buffer"], organism["reinforce"]
    model = br.guard(tiny, buffer)
    for name in ("user", "sft"):
        released = br.release(model, organism[name], reinforce)
        br.save_adapter(tmp_path / "save", released, model)
        br.export_adapter(model, released, tmp_path / "adapter")
        br.export_model(model, released, tmp_path / "model")
        br.export_model(fold_adapter(model, released, "served"), None, tmp_path / "model")
        br.evaluate(model, Suite(), released)


def test_a_door_says_that_it_could_not_look(tiny, organism, tmp_path, caplog):
    user, reinforce = organism["user"], organism["reinforce"]
    doors = [
        lambda: br.release(tiny, user, reinforce),
        lambda: br.save_adapter(tmp_path / "save", user, tiny),
        lambda: br.export_adapter(tiny, user, tmp_path / "adapter"),
        lambda: br.export_model(tiny, None, tmp_path / "model"),
    ]
    for leave in doors:
        caplog.clear()
        leave()
        assert "not compared with a Buffer" in caplog.text


@pytest.mark.parametrize("roles", [(), ("BUFFER",), ("user\u200b",), ("user", "buffer "), ("",), ("unknown",)])
def test_a_role_that_is_none_goes_nowhere(tiny, organism, tmp_path, roles):
    adapter = organism["buffer"].replace(roles=roles)
    doors = [
        lambda: br.release(tiny, adapter, organism["reinforce"]),
        lambda: br.release(tiny, organism["user"], adapter),
        lambda: br.qr_merge(organism["user"], adapter),
        lambda: br.save_adapter(tmp_path / "to", adapter, tiny),
        lambda: br.export_adapter(tiny, adapter, tmp_path / "to"),
        lambda: br.export_model(tiny, adapter, tmp_path / "to"),
        lambda: fold_adapter(tiny, adapter, "served"),
    ]
    for leave in doors:
        with pytest.raises(br.UserError, match=r"roles are|nothing says what|made of"):
            leave()
    assert not [*tmp_path.iterdir()]


def test_a_user_s_rows_are_trained_beside_the_buffer_or_not_by_mistake(tiny, organism, make_tiny, rows, quick):
    buffer, other = organism["buffer"], make_tiny(rope_theta=5.0)
    cases = [
        (tiny, {}, "no Buffer, so these rows could undo"),
        (tiny, {"buffer": buffer, "undefended": True}, "both buffer= and undefended"),
        (tiny, {"buffer": organism["reinforce"]}, "needs the Buffer, got an adapter made of reinforce"),
        (tiny, {"buffer": organism["user"]}, "needs the Buffer, got an adapter made of user"),
        (tiny, {"buffer": buffer.replace(base="")}, "does not say for which base"),
        (other, {"buffer": buffer}, "made for the base"),
        (br.guard(tiny, buffer), {"buffer": lora.scaled(buffer, 2.0)}, "not the Buffer of the provider's folder"),
        (br.guard(tiny, buffer), {"buffer": organism["reinforce"].replace(roles=("buffer",))}, "not the Buffer"),
    ]
    for model, given, message in cases:
        with pytest.raises(br.UserError, match=message):
            br.train_user(model, rows, quick(), **given)
    for model, given, message in cases[2:]:
        with pytest.raises(br.UserError, match=message):
            br.train_reinforce(model, given["buffer"], rows, rows, quick())
    for wrong in (organism["user"], buffer.replace(base="f" * 64)):
        with pytest.raises(br.UserError, match="guard: "):
            br.guard(tiny, wrong)
    np.testing.assert_equal(br.guard(tiny).guard.fingerprints, ())
