"""Scripts: what is the user's to mend is one line on stderr and exit status 2."""

import ctypes
import pathlib
import platform
import re
import subprocess
import sys

import jax
import pytest

from br_jax.core import cli as command_line
from br_jax.core.cli import run_main
from br_jax.core.errors import Stopped, UserError
from br_jax.pipeline import STAGES

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # how ml_collections loads configs


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("rows.jsonl:3: no answer: add one"), 2, "error: rows.jsonl:3: no answer: add one\n"),
        (Stopped("stopped at step 3"), 143, "stopped at step 3\n"),
        (PermissionError(13, "Denied", "x"), 2, "error: x: Denied: check its permissions, or choose another place\n"),
        (KeyboardInterrupt(), 130, "\nstopped: the same command goes on from the last checkpoint\n"),
    ],
)
def test_exit_statuses(capsys, outcome, status, said):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == status and capsys.readouterr().err == said
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_main(lambda: 1 / 0)


ROOT = pathlib.Path(__file__).parents[2]
# What each setting may be: tests/experiment/test_settings.py.
PIPELINE = ["pipeline.py", "--config=configs/demo.py", "--workdir={tmp}/w"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (PIPELINE[:2], "--workdir is missing: Folder"),
        ([*PIPELINE, "--config.user.harmful_shar=0.1"], '"harmful_share"'),
        ([*PIPELINE, "--config.defences.l3.strength=1"], "l3.strength=1: there is no 'l3'"),
        ([*PIPELINE, "--stages=user,releas"], "'releas': near: release"),
        ([*PIPELINE, "--config.mesh.tensor=3"], "mesh .*does not fit"),
        ([*PIPELINE, "--config.user.train.rank=65"], r"rank is 65: the model's v is 128 x 64: .* at most 64"),
        ([*PIPELINE, "--config.user.n=1e30"], "1e30"),  # ml_collections' own
        ([*PIPELINE[:2], "--workdir={tmp}/file/run"], "file/run.*: Not a directory: choose another place"),
        ([*PIPELINE, "user"], "user: not a flag"),
        ([*PIPELINE, "--multihost", "--process_id=1"], "or --multihost alone"),
        (["sweep.py", *PIPELINE[1:], "--a=5"], "axis a: a value is 5.0: it must be a number from 0 to 1"),
        (["sweep.py", *PIPELINE[1:], "--n=0.5"], "--n=0.5: invalid literal"),
        (["sweep.py", *PIPELINE[1:], "--engine=ray", "--resources=[]"], "write ..CPU"),
        (["evaluate.py", *PIPELINE[1:], "--config.seed=True"], "True"),
        (["export.py", "--model={tmp}", "--to={tmp}/to"], "no adapter to export"),
        (["export.py", "--model={tmp}", "--to={tmp}/to", "--format=model", "--rank=4"], "a rank is for an adapter"),
        (["export.py", "--model={tmp}", "--adapter={tmp}", "--to={tmp}/to", "--rank=0"], "--rank=0"),
        (["report.py", "--workdir={tmp}"], "no finished cell"),
        (["report.py", "--workdir={tmp}", "--examples=-1"], "examples is -1: it must"),
        (["describe.py"], "a path is missing"),
        (["describe.py", "a", "b", "--plot=c.png"], "--plot is of one adapter"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(script, tmp_path, command, message):
    (tmp_path / "file").write_text("in the way")
    status, said = script(*(argument.format(tmp=tmp_path) for argument in command))
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert re.search(message, said), said
    assert [*tmp_path.rglob("*")] == [tmp_path / "file"], "something was written"


@pytest.mark.slow
def test_so_it_is_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "experiments/evaluate.py", PIPELINE[1], f"--workdir={tmp_path}/w"]
    command.append("--config.user.train.clip_norm=0")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    said = r"error: .*user\.train\.clip_norm is 0\.0: it must be a number above 0.*\n"
    assert re.fullmatch(said, done.stderr), done.stderr
    assert not [*tmp_path.iterdir()]


def test_help_is_no_error_and_names_the_stages(script):
    assert script("pipeline.py", "--help") == (0, "")
    assert f'"{", ".join(STAGES)}."' in pathlib.Path("experiments/pipeline.py").read_text()


@pytest.mark.parametrize(
    ("before", "flag", "after"),
    [(None, None, "~/.cache/br_jax/xla/here"), ("/x", None, "/x"), ("/x", "/y", "/y/here"), ("/x", "", None)],
)
def test_where_compiled_programs_are_kept(monkeypatch, before, flag, after):
    monkeypatch.setattr("platform.node", lambda: "here")
    kept = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", before)
        command_line._keep_compiled(flag)
        assert jax.config.jax_compilation_cache_dir == (after and str(pathlib.Path(after).expanduser()))
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


AGAIN_AND_AGAIN = """
import resource
from br_jax.core import cli as command_line
command_line._keep_freed_memory()
bytearray(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_freed_is_kept():
    """64 MB are asked for eight times more, and no page of them is new."""
    done = subprocess.run([sys.executable, "-c", AGAIN_AND_AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, done.stdout


def test_another_libc_than_glibc_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    command_line._keep_freed_memory()
