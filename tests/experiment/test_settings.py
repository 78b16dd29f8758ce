"""What a config's numbers may be, to themselves, to each other, to the model, the devices and the data."""

import pathlib

import jax
import pytest
from hostile import HOSTILE, inside

from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh
from br_jax.experiment import run as run_module
from br_jax.experiment.grid import Grid, plan, run_sweep
from br_jax.experiment.run import Experiment
from br_jax.experiment.settings import TRAINED, bounds, check_sizes, settle
from br_jax.models.io.hf import write_hf
from br_jax.pipeline import run_pipeline
from br_jax.provider import write_provider

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
BOUNDS = bounds()
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "paper"))  # which is a part


def numbers(config):
    """Every path of a config that leads to a number, or to several."""
    found = {path: leaf for path, leaf in leaves(config.to_dict()) if not isinstance(leaf, bool | str)}
    return {path: leaf for path, leaf in found.items() if not path.startswith("model.spec.")}


def leaves(tree, path=""):
    for name, leaf in tree.items():
        yield from leaves(leaf, f"{path}{name}.") if isinstance(leaf, dict) else [(f"{path}{name}", leaf)]


def put(config, path, value):
    """Sets a field of a config, whatever its type was."""
    *parts, name = path.split(".")
    for part in parts:
        config = config[part]
    with config.unlocked():
        if name in config:
            del config[name]
        config[name] = value


def said(call, *args):
    """The one line of the `UserError` that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_holds_and_has_bounds_for_every_number(load_config, name):
    config = load_config(name)
    settle(config)
    known = {path for path, leaf in numbers(config).items() if isinstance(leaf, int | float) or "buckets" in path}
    assert known <= BOUNDS.keys() and len(known) > 100


def test_every_number_of_a_config_keeps_to_its_bounds(load_config):
    config = load_config("base")
    for path, usual in numbers(config).items():
        if path not in BOUNDS:
            continue
        bound = BOUNDS[path]
        for value in HOSTILE:
            given = (value,) if bound.many else value
            put(config, path, given)
            if inside(value, bound):
                settle(config)
            else:
                assert said(settle, config) == f"{path} is {given!r}: it must be {bound}"
            put(config, path, usual)
    settle(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user.twice": 2}, "user.twice: there is no such setting"),
        ({"align.train.accumulation": 3}, "align.train.accumulation is 3: it must divide batch_size 8"),
        ({"user.train.packing": 50}, "user.train.packing is 50: a row of max_length 100 must fit in"),
        ({"buffer.train.targets": ()}, "buffer.train.targets is (): name at least one"),
        ({"user.train.remat": "ful"}, "user.train.remat 'ful': it is none, full"),
        ({"model.spec": {"vocab_size": 8}}, "model.spec: "),
        ({"model.spec.vocabulary": 8}, "model.spec.vocabulary: there is no such setting; near: "),
    ],
)
def test_settings_that_contradict_each_other(config, changes, message):
    for path, value in changes.items():
        put(config, path, value)
    assert said(settle, config).startswith(message)


TOO_MUCH = [
    ({"user.train.rank": 17}, "user.train.rank is 17: the model's v is 48 x 16: it must be at most 16"),
    ({"align.train.targets": ("q", "w")}, "unknown align.train.targets: adapter target 'w'; near: "),
    ({"buffer.train.max_length": 129}, "buffer.train.max_length is 129: the model's context is 128 tokens"),
    ({"buffer.harmful": 0}, "buffer.rows: there are none to train on"),
    ({"user.train.epochs": 10**6, "user.n": 81}, "user.train.epochs is 1000000: on 81 rows that is more than"),
    ({"reinforce.train.batch_size": 12}, "reinforce.train.batch_size is 12: 8 devices must divide it"),
    ({"user.train.batch_size": 8, "user.train.accumulation": 2}, "user.train.batch_size is 8 in 2 micro-batches: 8"),
    ({"eval.answer_tokens": 128}, "eval.answer_tokens is 128: the model's context is 128 tokens"),
    ({"distill.answer_tokens": 10**6}, "distill.answer_tokens is 1000000: the model's context is 128"),
    ({"model.source": "", "pretrain.train.max_length": 9}, "pretrain.rows: there are none"),
    ({"user.kind": "split", "user.n": 1}, "user.rows:"),  # those of a job
]
ENOUGH = [
    {"user.train.rank": 16, "user.train.max_length": 128, "eval.answer_tokens": 127},
    {"user.train.rank": 32, "user.train.targets": ("q",), "user.train.steps": 1, "user.train.epochs": 10**6},
    {"user.train.batch_size": 12, "user.train.packing": 100},
    {"buffer.adapter": "given", "buffer.train.rank": 99, "buffer.harmful": 0},  # none of these are trained
    {"align.refusals": 0, "align.benign": 0, "align.train.rank": 99},
    {"pretrain.train.max_length": 999},
    {"user.kind": "split", "user.n": 16, "user.train.epochs": 1},
    {"user.kind": "ten_rows", "user.n": 40_000, "user.train.epochs": 3},  # ten of them take part 12,000 times
]


@pytest.mark.parametrize(("changes", "message"), TOO_MUCH + [(changes, None) for changes in ENOUGH])
def test_what_the_model_and_the_devices_can_give(config, tiny, changes, message):
    for path, value in changes.items():
        put(config, path, value)
    if message:
        assert said(check_sizes, settle(config), tiny.spec, make_mesh()).startswith(message)
    else:
        check_sizes(settle(config), tiny.spec, make_mesh())


@pytest.fixture
def nothing_done(calls, monkeypatch):
    """That no model may be loaded, and no row made of one's answers."""
    monkeypatch.setattr(run_module, "load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    return calls


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("user.n", "user.n [+] user.probes asks for"),
        ("buffer.harmful", "buffer.harmful [+] .*: devices: .* prompts asked for, but split 'train' has"),
        ("reinforce.refusals", "reinforce.refusals: devices: "),
        ("align.benign", "benign rows are asked for, and there are .*: lower align.benign"),
        ("eval.topic", "eval.topic: devices: .* but split 'test' has"),
        ("calibrate.harmful", "calibrate.harmful: devices: .* but split 'validation' has"),
        ("data.texts.n", "data.texts.n: .* prompts are asked for"),
    ],
)
def test_more_than_the_data_has_is_found_before_anything_is_made(config, nothing_done, tmp_path, path, message):
    config.calibrate.benign = 1 if path == "calibrate.harmful" else 0
    put(config, path, 5_000_000)
    with pytest.raises(UserError, match=message) as caught:
        run_pipeline(config, tmp_path / "w")
    assert "\n" not in str(caught.value) and not (tmp_path / "w").exists() and not nothing_done["trained"]


def test_the_sizes_are_those_of_a_model_that_is_not_loaded(config, tiny, tmp_path):
    folder, provider = tmp_path / "model", tmp_path / "theirs"
    write_hf(folder, tiny.spec, jax.device_get(tiny.params), tiny.tokenizer)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_provider(provider, str(folder), None, tiny, "float32", None)
    config.buffer.train.rank = 17
    for source in (folder, provider):
        config.model.source = str(source)
        with pytest.raises(UserError, match=r"^buffer\.train\.rank is 17: the model's v is 48 x 16"):
            run_pipeline(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    config.model.source = ""
    with pytest.raises(UserError, match=r"model\.source is empty, and model\.spec says no sizes"):
        run_pipeline(config, tmp_path / "w")


@pytest.mark.parametrize("judges", ["topic, classifier@0", f"classifier@{10**5000:x}"])
def test_a_judge_s_length_is_a_number_of_tokens(config, calls, tmp_path, judges):
    config.eval.judges = judges
    line = said(Experiment(config, tmp_path / "w").check)
    assert line.startswith("eval.judges: classifier@: the length is ") and len(line) < 200


@pytest.fixture
def axes(config):
    source = config.model.source
    return {"models": [source], "tasks": ["moods"], "topics": ["devices"], "n": [30], "p": [0.1], "seeds": [1],
            "methods": ["ours"], "a": [0.1]}  # fmt: skip


def test_a_sweep_s_axis_has_the_bounds_of_what_it_sets(axes):
    for axis, path in {"n": "user.n", "p": "user.harmful_share", "seeds": "seed", "a": "merge.a"}.items():
        for value in HOSTILE:
            if inside(value, BOUNDS[path]):
                Grid(**axes | {axis: [value]})
            else:
                line = said(lambda value=value, axis=axis: Grid(**axes | {axis: [*axes[axis], value]}))
                assert line == f"the sweep's axis {axis}: a value is {value!r}: it must be {BOUNDS[path]}"


def test_a_sweep_is_checked_as_a_whole_before_a_folder_is_made(config, nothing_done, axes, tmp_path):
    def run(**changed):
        list(run_sweep(config, tmp_path / "s", Grid(**axes | changed)))

    assert "user.n + user.probes asks for" in said(lambda: run(n=[30, 5_000_000]))
    config.user.train.clip_norm = -1.0
    for call in (run, lambda: plan(config, tmp_path / "s", Grid(**axes))):
        assert said(call).startswith("user.train.clip_norm is -1.0: it must be a number above 0")
    assert not (tmp_path / "s").exists()


def test_the_trained_stages_are_those_with_a_train(config):
    assert {name for name, part in config.items() if isinstance(part, type(config)) and "train" in part} == {*TRAINED}
