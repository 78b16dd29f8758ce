"""Scripts: what is the user's to mend is one line on stderr and exit status 2."""

import pathlib
import re

import jax
import pytest

from br_jax import command_line
from br_jax.command_line import run_main
from br_jax.errors import Stopped, UserError
from br_jax.experiment.pipeline import STAGES

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # how ml_collections loads configs


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("rows.jsonl:3: no answer: add one"), 2, "error: rows.jsonl:3: no answer: add one\n"),
        (Stopped("stopped at step 3"), 143, "stopped at step 3\n"),
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


DEMO = "--config=configs/demo.py"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pipeline.py", [DEMO], "--workdir is missing: Folder"),
        ("pipeline.py", [DEMO, "--workdir={tmp}", "--config.user.harmful_shar=0.1"], '"harmful_share"'),
        ("pipeline.py", [DEMO, "--workdir={tmp}", "--stages=user,releas"], "'releas': near: release"),
        ("pipeline.py", [DEMO, "--workdir={tmp}", "--config.mesh.tensor=3"], "mesh .*does not fit"),
        ("pipeline.py", [DEMO, "--workdir={tmp}/file/run"], "cannot be written"),
        ("pipeline.py", [DEMO, "--workdir={tmp}", "user"], "user: not a flag"),
        ("pipeline.py", [DEMO, "--workdir={tmp}", "--multihost", "--process_id=1"], "or --multihost alone"),
        ("export.py", ["--model={tmp}", "--to={tmp}/to"], "no adapter to export"),
        ("export.py", ["--model={tmp}", "--to={tmp}/to", "--format=model", "--rank=4"], "a rank is for an adapter"),
        ("report.py", ["--workdir={tmp}"], "no finished cell"),
        ("describe.py", [], "a path is missing"),
        ("describe.py", ["a", "b", "--plot=c.png"], "--plot is of one adapter"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(script, tmp_path, name, arguments, message):
    (tmp_path / "file").write_text("in the way")
    status, said = script(name, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert re.search(message, said), said


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
