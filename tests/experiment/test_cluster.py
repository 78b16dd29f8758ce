"""Sweeps on Ray: as in one process, though a node dies or has no common folder; wrong requests are a line."""

import json
import pathlib
import sys

import pytest

from br_jax.configs import demo
from br_jax.core.errors import UserError
from br_jax.experiment import cluster
from br_jax.experiment.grid import Grid, in_turn, run_sweep
from br_jax.experiment.settings import settle


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "--resources: not valid JSON"),
        ("[2]", "--resources=[2]: write"),
        ('{"CPU": -1}', "--resources: CPU is -1"),
    ],
)
def test_wrong_resources_are_one_line(text, said):
    with pytest.raises(UserError) as caught:
        cluster.parse_resources(text)
    assert str(caught.value).startswith(said)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'br_jax\[ray\]'"):
        cluster.on_ray("local", {"CPU": 1})


def test_a_bucket_has_what_is_new_but_no_checkpoints_and_nothing_at_hand_is_replaced(tmp_path):
    here, there, bucket = tmp_path / "a", tmp_path / "b", str(tmp_path / "bucket")
    files = {"provider/buffer/adapter/x": "1", "provider/buffer/checkpoints/5/y": "2", "provider/.lock": ""}
    for name, content in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(content)
    cluster._push(bucket, here, here / "provider")
    cluster._pull(bucket, there, there / "provider")
    assert [str(f.relative_to(there)) for f in there.rglob("*") if f.is_file()] == ["provider/buffer/adapter/x"]
    (there / "provider/buffer/adapter/x").write_text("mine")
    (here / "provider/buffer/adapter/x").write_text("longer than it was")
    cluster._push(bucket, here, here / "provider")
    cluster._pull(bucket, there, there / "provider")
    assert (there / "provider/buffer/adapter/x").read_text() == "mine"
    assert (tmp_path / "bucket/provider/buffer/adapter/x").read_text() == "longer than it was"
    for each in ("", bucket):  # a provider's folder that is not the table's
        cluster._push(each, there, here / "provider")
        cluster._pull(each, there, here / "provider")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes, a core each; Ray starts one once in a process."""
    pytest.importorskip("ray", reason="the cluster's tests need Ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        for name, value in (
            ("JAX_PLATFORMS", "cpu"),
            ("JAX_NUM_CPU_DEVICES", "8"),
        ):  # as the tests' own process has them
            environment.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes.add_node(num_cpus=1)
        yield nodes
        nodes.shutdown()


CONFIG = demo.get_config("smoke")
CONFIG.model.source = "br_jax/tiny"
GRID = Grid(
    models=["br_jax/tiny"], tasks=["moods"], topics=["devices"], n=[16], p=[0.1, 0.5], seeds=[1, 2],
    methods=["aligned", "sft"], a=[0.1],
)  # fmt: skip


def sweep(workdir, *how):
    """The cells of a small grid, as they are made."""
    return run_sweep(CONFIG, workdir, GRID, engine=cluster.on_ray(*how) if how else in_turn)


def told(cells):
    """What is the same wherever a cell was made."""
    return sorted((*cell["run"].values(), cell["method"], json.dumps(cell["scores"])) for cell in cells)


@pytest.mark.slow
def test_a_node_dies_and_every_cell_is_there_once_as_in_one_process(nodes, tmp_path):
    """And from the files alone; and by way of a bucket, for another caller too, who has nothing at hand."""
    expected, cells, cores = told(sweep(tmp_path / "one")), [], {"CPU": 1}
    for cell in sweep(tmp_path / "two", nodes.address, cores):
        cells.append(cell)
        if len(cells) == 1:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    assert told(cells) == expected and len(cells) == 8
    assert told(sweep(tmp_path / "two", "127.0.0.1:1", cores)) == expected  # no task is left, and no cluster needed
    for name in ("three", "four"):
        assert told(sweep(tmp_path / name, nodes.address, cores, str(tmp_path / "bucket"))) == expected


@pytest.mark.slow
def test_what_no_node_has_is_a_line_and_a_run_that_fails_stops_no_other(nodes, tmp_path):
    for address, wanted, said in (("127.0.0.1:1", {"CPU": 1}, "--address"), (nodes.address, {"TPU": 4}, "no node has")):
        with pytest.raises(UserError, match=said):
            list(sweep(tmp_path / "a", address, wanted))
    provider = pathlib.Path(GRID.runs()[0].settings(settle(CONFIG), tmp_path / "b").provider)
    provider.mkdir(parents=True)
    (provider / "buffer").write_text("in the way")
    cells = sweep(tmp_path / "b", nodes.address, {"CPU": 1})
    assert {next(cells)["run"]["seed"] for _ in range(4)} == {2}
    with pytest.raises(OSError, match="buffer"):
        next(cells)
