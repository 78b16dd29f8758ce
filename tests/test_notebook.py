"""The notebooks run from their first cell to their last, on a config that is all plumbing."""

import os
import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colab"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "images", "made"),
    [
        ("quickstart", 3, "report.md"),
        ("reproduce", 1, "sweep.md"),
        ("many_users", 1, "jobs/user0/user/stage.json"),
        ("compare", 2, "sweep.md"),
    ],
)
def test_it_runs_and_shows_its_figures(tmp_path, monkeypatch, name, images, made):
    monkeypatch.setenv("BR_JAX_DEMO_SIZE", "smoke")
    monkeypatch.setenv("BR_JAX_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without its outputs"
    where = {"metadata": {"path": os.fspath(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= images
    assert (tmp_path / "run" / made).is_file()
    assert not list(tmp_path.rglob("released/*.bin"))
