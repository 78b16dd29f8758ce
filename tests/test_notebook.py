"""The notebook runs from its first cell to its last, on a config that is all plumbing."""

import os
import pathlib

import nbclient
import nbformat

NOTEBOOK = pathlib.Path(__file__).parents[1] / "colab" / "quickstart.ipynb"


def test_quickstart_runs_and_draws_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("BR_JAX_DEMO_SIZE", "smoke")
    monkeypatch.setenv("BR_JAX_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without its outputs"
    where = {"metadata": {"path": os.fspath(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(images) == 3
    assert (tmp_path / "run" / "report.md").is_file()
    assert not list((tmp_path / "run" / "released").glob("*.bin"))
