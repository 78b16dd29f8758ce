"""Every file of a finished run, tampered with: the next read says so in one line, or makes it again as it was.

BR_JAX_TAMPER=turn pytest -s --timeout=0 tests/experiment/test_tampering.py    # or =all: each file in each way
"""

import itertools
import json
import os
import shutil

import pytest
from tampering import TAMPER

import br_jax as br
from br_jax.configs import demo
from br_jax.core.errors import UserError
from br_jax.pipeline import run_pipeline
from br_jax.provider import load_model
from br_jax.report.report import write_report

HOW = os.environ.get("BR_JAX_TAMPER")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HOW, reason="BR_JAX_TAMPER says how")]


def of_another(path):
    """Gives it the bytes of a file beside it, or one folder up where it is alone."""
    others = [other for folder in path.parents[:2] for other in sorted(folder.iterdir()) if other.is_file()]
    path.write_bytes(next(other for other in others if other != path).read_bytes())


WAYS = TAMPER | {"another's": of_another}


def small():
    config = demo.get_config("smoke")
    with config.model.spec.unlocked():
        config.model.spec.update(embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffw_dim=64)
    return config


def read_all(workdir):
    """What a run says of itself, from whatever reads it: the engine, the report, the provider's folder, the release."""
    cells = run_pipeline(small(), workdir)
    write_report(workdir)
    model = load_model(workdir / "provider")
    released = br.load_adapter(workdir / "released", model)
    scores = [cell["scores"] for cell in cells]
    hashes = json.loads((workdir / "results.json").read_text())["hashes"]
    return json.dumps([scores, hashes, br.adapters.lora.fingerprint(released)], sort_keys=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "w"
    return workdir, read_all(workdir)


def test_what_was_tampered_with_is_noticed(finished, tmp_path, monkeypatch):
    workdir, whole = finished
    files = [
        path.relative_to(workdir) for path in sorted(workdir.rglob("*")) if path.is_file() and path.name != ".lock"
    ]
    assert len(files) > 40
    ways = itertools.cycle(WAYS.items())
    for file in files:
        if file.parts[0] != "figures":  # which are drawn anew each time, and take most of it
            monkeypatch.setattr("br_jax.report.plots.encode", lambda figure: {})
        for name, tamper in WAYS.items() if HOW == "all" else [next(ways)]:
            copy = tmp_path / "w"
            shutil.copytree(workdir, copy)
            tamper(copy / file)
            try:
                assert read_all(copy) == whole, f"{file}, {name}: read as if nothing had happened"
                said = "as it was"
            except UserError as error:
                assert "\n" not in str(error) and str(tmp_path) in str(error), f"{file}, {name}: {error}"
                said = str(error).replace(str(tmp_path), "")[:120]
            print(f"{file}, {name}: {said}", flush=True)
            shutil.rmtree(copy)
        monkeypatch.undo()
