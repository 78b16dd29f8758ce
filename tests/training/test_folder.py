"""A run's folder: whose it is, what of it was tampered with, and when it makes way."""

import json
import shutil

import pytest
from tampering import TAMPER

from br_jax.core.errors import UserError
from br_jax.core.io import owned
from br_jax.core.records import read_record
from br_jax.training.run import train_adapter


def train(tiny, rows, config, workdir, role="user", **options):
    return train_adapter("user", role, tiny, rows, config, workdir=workdir, **options)


@pytest.fixture(scope="module")
def finished(tiny, rows, quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(tiny, rows, quick(probe_every=2), folder, probes={"benign": rows[:2]})
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "w")
    return tmp_path / "w"


FILES = [
    "run.json",
    "stage.json",
    "metrics.jsonl",
    "probes.jsonl",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]


@pytest.mark.parametrize("how", TAMPER)
@pytest.mark.parametrize("name", FILES)
def test_what_was_tampered_with_is_noticed(copy, tiny, rows, quick, name, how):
    if (name, how) == ("stage.json", "gone"):
        pytest.skip("then the run is not finished, and is made again")
    TAMPER[how](copy / "user" / name)
    with pytest.raises(UserError, match="delete") as caught:
        train(tiny, rows, quick(probe_every=2), copy, probes={"benign": rows[:2]})
    assert str(copy / "user") in str(caught.value) and "\n" not in str(caught.value)


def test_another_run_s_files_are_noticed(copy, tiny, rows, quick, tmp_path):
    """One file of another run, all of its files, and its whole folder."""
    train(tiny, rows, quick(seed=7), tmp_path / "other")
    other = tmp_path / "other" / "user"
    for name in ("stage.json", "run.json", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        kept = (copy / "user" / name).read_bytes()
        shutil.copy(other / name, copy / "user" / name)
        with pytest.raises(UserError, match=r"changed or damaged|another config: seed was 7, is 42"):
            train(tiny, rows, quick(), copy)
        (copy / "user" / name).write_bytes(kept)
    train_adapter("buffer", "buffer", tiny, rows, quick(), workdir=copy / "provider", provider=True)
    shutil.rmtree(copy / "user")
    shutil.copytree(copy / "provider" / "buffer", copy / "user")
    with pytest.raises(UserError, match=r"another name: of was .buffer., is .user."):
        train(tiny, rows, quick(), copy)


def test_a_run_that_came_to_nothing_makes_way(tiny, rows, quick, tmp_path):
    """Of a corrected setting: there is no checkpoint that anybody could go on from."""
    for wrong, message in (({"max_length": 2}, "no row is left"), ({"learning_rate": 0.9, "clip_norm": 1e30}, "")):
        try:
            train(tiny, rows, quick(**wrong), tmp_path)
        except UserError as error:
            assert message in str(error)
            assert not (tmp_path / "user").exists(), "nothing is written before all is checked"
        else:
            shutil.rmtree(tmp_path / "user" / "adapter")
            (tmp_path / "user" / "stage.json").unlink()
    train(tiny, rows, quick(), tmp_path)
    assert read_record(tmp_path / "user" / "run.json")["config"]["learning_rate"] == 1e-2
    steps = [json.loads(line)["step"] for line in (tmp_path / "user" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_folder_in_use_is_said_and_a_finished_one_is_read(finished, tiny, rows, quick, tmp_path):
    with owned(finished / "user"):
        train(tiny, rows, quick(probe_every=2), finished, probes={"benign": rows[:2]})
    with owned(tmp_path / "user"), pytest.raises(UserError, match=r"user: process \d+ .* works there"):
        train(tiny, rows, quick(), tmp_path)
    assert {path.name for path in (tmp_path / "user").iterdir()} == {".lock"}
