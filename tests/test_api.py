"""The names that others build on."""

import subprocess
import sys

import pytest

import br_jax as br

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
