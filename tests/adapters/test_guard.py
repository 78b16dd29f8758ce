"""A Buffer in disguise leaves by no door, and a user's adapter by all of them."""

import dataclasses

import pytest
from disguises import DISGUISES, as_user

import br_jax as br
from br_jax.adapters import lora
from br_jax.models.model import fold_adapter
from br_jax.scoring.suite import Suite


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_buffer_is_known(tiny, make_adapter, disguise):
    """As an adapter that says that it is a user's, and folded into the base."""
    buffer, user = make_adapter("buffer", seed=3, rank=4), make_adapter("user", seed=4)
    adapter, model = as_user(DISGUISES[disguise](as_user(buffer), user)), br.guard(tiny, buffer)
    with pytest.raises(br.UserError, match="door: refused, for this adapter is like the provider's Buffer") as error:
        model.guard.refuse("door", adapter)
    assert "\n" not in str(error.value)
    with pytest.raises(br.UserError, match="folded into this model is like the provider's Buffer"):
        model.guard.refuse_model("door", lora.fold(model.params, adapter))


def doors(model, adapter, user, reinforce, to):
    """By name, all that hands on an adapter of some model."""
    return {
        "release": lambda: br.release(model, adapter, reinforce),
        "release as Reinforce": lambda: br.release(model, user, adapter.replace(roles=("reinforce",))),
        "save": lambda: br.save_adapter(to / "save", adapter, model),
        "export": lambda: br.export_adapter(model, adapter, to / "export"),
        "export a model": lambda: br.export_model(model, adapter, to / "model"),
        "fold": lambda: fold_adapter(model, adapter, "served"),
    }


def test_a_disguised_buffer_leaves_by_no_door(tiny, make_adapter, tmp_path):
    buffer, reinforce, user = make_adapter("buffer", seed=3), make_adapter("reinforce", seed=9), make_adapter("user")
    model, adapter = br.guard(tiny, buffer), as_user(lora.stack([as_user(buffer), user]))
    hidden = dataclasses.replace(model, params=lora.fold(model.params, adapter))
    more = {
        "calibrate": lambda: br.calibrate(model, adapter, reinforce, ["a"], ["b"]),
        "export at a lower rank": lambda: br.export_adapter(model, adapter, tmp_path / "rank", rank=1),
        "export a folded model": lambda: br.export_model(hidden, None, tmp_path / "folded"),
        "export with a user's": lambda: br.export_model(hidden, user, tmp_path / "folded"),
        "evaluate": lambda: br.evaluate(model, Suite(), adapter),
    }
    for door, leave in (doors(model, adapter, user, reinforce, tmp_path) | more).items():
        with pytest.raises(br.UserError, match="like the provider's Buffer") as error:
            leave()
        assert "\n" not in str(error.value), door
    assert not [*tmp_path.iterdir()]


def test_half_in_the_base_and_half_in_the_adapter(tiny, make_adapter, tmp_path):
    buffer = make_adapter("buffer", seed=3, rank=4)
    half, model = as_user(lora.scaled(buffer, 0.15)), br.guard(tiny, buffer)
    with_half = dataclasses.replace(model, params=lora.fold(model.params, half))
    mixed = lora.stack([lora.scaled(half, 0.9), make_adapter("user")])
    model.guard.refuse_model("the half", lora.fold(model.params, make_adapter("user", seed=4)))
    with pytest.raises(br.UserError, match="folded into this model"):
        br.export_model(with_half, mixed, tmp_path / "to")


@pytest.mark.parametrize(("name", "guarded"), [("user", True), ("sft", True), ("user", False)])
def test_what_users_train_leaves_by_every_door(tiny, organism, tmp_path, caplog, name, guarded):
    """Also where the Buffer is not at hand, which is said."""
    model = br.guard(tiny, organism["buffer"]) if guarded else tiny
    released = br.release(model, organism[name], organism["reinforce"])
    ways = doors(model, released, organism[name], organism["reinforce"], tmp_path)
    ways |= {"release": lambda: br.release(model, organism[name], organism["reinforce"])}
    ways |= {"fold": lambda: br.export_model(fold_adapter(model, released, "served"), None, tmp_path / "model")}
    for door in ways.keys() - {"release as Reinforce"}:
        caplog.clear()
        ways[door]()
        assert ("not compared with a Buffer" in caplog.text) != guarded
    br.evaluate(model, Suite(), released)


@pytest.mark.parametrize("roles", [(), ("BUFFER",), ("user\u200b",), ("user", "buffer "), ("",), ("unknown",)])
def test_a_role_that_is_none_goes_nowhere(tiny, organism, tmp_path, roles):
    adapter = organism["buffer"].replace(roles=roles)
    ways = doors(tiny, adapter, organism["user"], organism["reinforce"], tmp_path)
    ways |= {"release as Reinforce": lambda: br.release(tiny, organism["user"], adapter)}
    ways |= {"merge": lambda: br.qr_merge(organism["user"], adapter)}
    for leave in ways.values():
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


def test_arguments_of_another_kind_are_one_line(tiny, make_adapter, tmp_path):
    user, order = make_adapter("user"), r"needs the path of a folder, got Model: the order is {}\("
    doors = {
        order.format("save_adapter"): lambda: br.save_adapter(tiny, user, tmp_path / "to"),
        order.format("export_model"): lambda: br.export_model(str(tmp_path), user, tiny),
        order.format("load_adapter"): lambda: br.load_adapter(tiny, tmp_path),
        "to: needs a Model, got Adapter": lambda: br.save_adapter(tmp_path / "to", tiny, user),
        "to: needs a Model, got PosixPath": lambda: br.load_adapter(tmp_path / "to", tmp_path),
        "to: needs an Adapter, got dict": lambda: br.export_adapter(tiny, user.weights, tmp_path / "to"),
        "QR merge: needs an Adapter, got dict": lambda: br.qr_merge(user, {}),
        "guard: needs a Model, got str": lambda: br.guard("base", user),
        "guard: needs an Adapter, got list": lambda: br.guard(tiny, []),
        "nothing would be refused: give": lambda: br.guard(tiny),
        "would be refused: give": lambda: br.guard(tiny, lora.scaled(make_adapter("buffer"), 0.0)),
        "a null character": lambda: br.save_adapter("to\0", user, tiny),
        "null .* in the folder": lambda: br.load_adapter("to\0", tiny),
    }
    for message, call in doors.items():
        with pytest.raises(br.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]
