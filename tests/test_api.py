"""The names that others build on."""

import subprocess
import sys

import pytest
from hostile import HOSTILE

import br_jax as br
from br_jax.adapters.diagnostics import best_rank

NAMES = (
    "load_model", "load_adapter", "save_adapter", "train_buffer", "train_reinforce", "train_user", "detach",
    "qr_merge", "release", "generate", "evaluate",
)  # fmt: skip


def test_every_name_is_there():
    assert set(NAMES) <= set(br.__all__) and sorted(br.__all__) == br.__all__
    assert all(callable(getattr(br, name)) for name in NAMES)
    assert not [name for name in br.__all__ if not hasattr(br, name)]


def test_importing_does_nothing():
    """No device is touched: a user can still choose the platform, or the number of fake devices."""
    code = (
        "import sys, br_jax, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)  # an error once there is a device\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr


def test_adapters_travel_by_the_public_names(tiny, make_tiny, make_adapter, tmp_path):
    adapter = make_adapter("user")
    br.save_adapter(tmp_path / "adapter", adapter, tiny)
    assert br.load_adapter(tmp_path / "adapter", tiny).roles == ("user",)
    with pytest.raises(br.UserError, match=f"made for the base {tiny.fingerprint}"):
        br.load_adapter(tmp_path / "adapter", make_tiny(rope_theta=5.0))


@pytest.fixture
def call(tiny, make_adapter, tmp_path):
    """call(name, **numbers): a function of the API with good arguments, but for these."""
    user = make_adapter("user")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    functions = {
        "generate": lambda **numbers: br.generate(tiny, ["a"], **numbers),
        "calibrate": lambda **numbers: br.calibrate(tiny, user, make_adapter("reinforce"), ["a"], ["b"], **numbers),
        "read_rows": lambda **numbers: br.read_rows(tmp_path / "rows.jsonl", **numbers),
        "best_rank": lambda **numbers: best_rank(user, **numbers),
        "export_adapter": lambda **numbers: br.export_adapter(tiny, user, tmp_path / "out", **numbers),
        "MergeConfig": br.MergeConfig,
        "TrainConfig": br.TrainConfig,
        "Suite": br.Suite,
    }
    return lambda name, **numbers: functions[name](**numbers)


@pytest.mark.parametrize(
    ("name", "setting", "fits"),
    [
        ("generate", "max_new_tokens", ()),
        ("generate", "batch_size", ()),
        ("generate", "temperature", (0, 0.5)),
        ("generate", "seed", (0,)),
        ("calibrate", "answer_tokens", ()),
        ("calibrate", "batch_size", ()),
        ("read_rows", "max_rows", ()),
        ("best_rank", "rank", ()),
        ("export_adapter", "rank", ()),
        ("MergeConfig", "a", (0, 0.5)),
        ("MergeConfig", "scale", (0.5,)),
        ("TrainConfig", "learning_rate", (0.5,)),
        ("TrainConfig", "steps", (0,)),
        ("Suite", "batch_size", ()),
    ],
)
def test_a_hostile_number_is_refused_by_its_name_and_nothing_is_done(call, tmp_path, compiles, name, setting, fits):
    for value in HOSTILE:
        if value is True or value not in fits:
            with pytest.raises(br.UserError, match=rf"\b{setting} is .*: it must be a (whole )?number ") as caught:
                call(name, **{setting: value})
            assert "\n" not in str(caught.value)
    assert not compiles and not (tmp_path / "out").exists()
