"""The launch scripts, without a cloud: shellcheck reads them, and a fake gcloud stands in for the slice.

The fake writes down how it was called. What it is asked to run on a worker runs here, in a folder that stands for the
worker's home, so that quoting, the lock and exit statuses are tested as bash and flock have them.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(
    [path for top in ROOT.glob("[!.]*/") for path in top.rglob("*.sh")] + [*ROOT.glob("*.sh"), ROOT / ".ci" / "run"]
)

GCLOUD = f"""#!{sys.executable}
import json, os, subprocess, sys

arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(["gcloud", *arguments]) + "\\n")
states = os.environ["STATES"]
if "describe" in arguments:
    with open(states) as file:
        state, *rest = file.read().split()
    with open(states, "w") as file:
        file.write(" ".join(rest or [state]))
    print(state)
for argument in arguments:
    if argument.startswith("--command="):
        sys.exit(subprocess.run(["bash", "-c", argument[10:]], cwd=os.environ["WORKER"]).returncode)
"""
KUBECTL = '#!/bin/sh\necho "$@" >"$WORKER/arguments"\ncat >"$WORKER/manifest.yaml"\n'

pytestmark = pytest.mark.slow

SLICE = {"NAME": "slice", "PROJECT": "me", "ZONE": "us-west4-a", "ACCELERATOR_TYPE": "v5litepod-8"}
WHERE = ["--project=me", "--zone=us-west4-a"]
TPUS = ["gcloud", "compute", "tpus"]
GKE = {
    "NAME": "demo",
    "IMAGE": "us-docker.pkg.dev/me/br/br_jax:1",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "2x4",
    "CHIPS_PER_HOST": "8",
    "CLAIM": "shared",
}


class Cloud:
    """Runs the launch scripts with fakes first on PATH; `states`: what the queued resource will be, look after look."""

    def __init__(self, folder: pathlib.Path):
        self.worker = folder / "worker"
        self._calls, self._bin, self.states = folder / "calls.jsonl", folder / "bin", folder / "states"
        (self.worker / "br_jax" / ".venv" / "bin").mkdir(parents=True)
        (self.worker / "br_jax" / ".venv" / "bin" / "python").symlink_to(sys.executable)
        shutil.copytree(LAUNCH, self.worker / "br_jax" / "experiments" / "launch")
        self._bin.mkdir()
        for name, text in {"gcloud": GCLOUD, "kubectl": KUBECTL, "sleep": "#!/bin/sh\n"}.items():
            (self._bin / name).write_text(text)
            (self._bin / name).chmod(0o755)
        self.states.write_text("ACTIVE")

    def run(self, script: str, *arguments: str, **changes) -> subprocess.CompletedProcess:
        """Runs a launch script with settings in its environment; a change to None takes a setting away."""
        settings = (GKE if script == "gke.sh" else SLICE) | changes
        folders = {"HOME": self.worker, "WORKER": self.worker, "CALLS": self._calls, "STATES": self.states}
        return subprocess.run(
            [LAUNCH / script, *arguments],
            env={"PATH": f"{self._bin}:{os.environ['PATH']}"}
            | {name: str(value) for name, value in (settings | folders).items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[list[str]]:
        """How gcloud was called."""
        return [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def ssh(worker: str, command: str) -> list[str]:
    return [*TPUS, "tpu-vm", "ssh", "slice", *WHERE, f"--worker={worker}", f"--command={command}"]


def scp(source: str, target: str, worker: str) -> list[str]:
    return [*TPUS, "tpu-vm", "scp", source, target, *WHERE, f"--worker={worker}"]


def test_shellcheck_has_nothing_to_say():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "--severity=style", *SCRIPTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_dry_run_prints_every_command_in_order_and_runs_none(cloud):
    script = ["experiments/pipeline.py", "--config=configs/demo.py", "--config.name=it's a try"]
    result = cloud.run("tpu_vm.sh", "--dry-run", "--spot", "all", "--", *script, SHARED="gs://bucket", RUN="try")
    assert (result.returncode, result.stderr) == (0, "")
    worker, archive, folder = "br_jax/experiments/launch/worker.sh", f"{ROOT}/build/br_jax.tar.gz", f"{ROOT}/runs/try"
    kind = ["--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert [shlex.split(line) for line in result.stdout.splitlines()] == [
        [*TPUS, "queued-resources", "create", "slice", *WHERE, "--node-id=slice", *kind, "--spot"],
        [*TPUS, "queued-resources", "describe", "slice", *WHERE, "--format=value(state.state)"],
        ["mkdir", "-p", f"{ROOT}/build"],
        ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        scp(archive, "slice:br_jax.tar.gz", "all"),
        ssh("all", "mkdir -p br_jax && tar -xzf br_jax.tar.gz -C br_jax"),
        ssh("all", f"{worker} install /mnt/br_jax gs://bucket"),
        ssh("all", f"{worker} start {shlex.join(script[:2])} '--config.name=it'\\''s a try' --workdir=/mnt/br_jax/try"),
        ssh("0", f"{worker} follow"),
        ssh("0", f"{worker} status"),
        ssh("0", "tar --exclude=./provider --exclude=checkpoints -czf run.tar.gz -C /mnt/br_jax/try ."),
        ["mkdir", "-p", folder],
        scp("slice:run.tar.gz", f"{folder}/run.tar.gz", "0"),
        ["tar", "-xzf", f"{folder}/run.tar.gz", "-C", folder],
        ["rm", f"{folder}/run.tar.gz"],
        [*TPUS, "queued-resources", "delete", "slice", *WHERE, "--force", "--quiet"],
    ]
    assert cloud.calls == []


def test_a_repository_is_cloned_at_its_ref(cloud):
    source = cloud.worker.parent / "source"
    shutil.rmtree(cloud.worker / "br_jax")
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", source], check=True)
    for version in ("first", "second"):
        (source / "file").write_text(version)
        for words in (["add", "."], ["commit", "--quiet", "--message=x"], ["tag", version]):
            subprocess.run(["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)
    for settings, found in (({"REF": "first"}, "first"), ({}, "second")):
        cloud.run("tpu_vm.sh", "install", REPOSITORY=str(source), **settings)  # its worker.sh is not in that repository
        assert (cloud.worker / "br_jax" / "file").read_text() == found


def test_the_type_sets_the_image_and_multihost(cloud):
    for kind, version, several in (
        ("v4-8", "tpu-ubuntu2204-base", False),
        ("v5p-16", "v2-alpha-tpuv5", True),
        ("v5litepod-8", "v2-alpha-tpuv5-lite", False),
        ("v6e-256", "v2-alpha-tpuv6e", True),
    ):
        shared = {"ACCELERATOR_TYPE": kind, "SHARED": "10.0.0.2:/share"}
        created = cloud.run("tpu_vm.sh", "--dry-run", "create", **shared)
        assert f"--runtime-version={version}" in shlex.split(created.stdout.splitlines()[0])
        started = cloud.run("tpu_vm.sh", "--dry-run", "run", "--", "script.py", **shared)
        assert started.stdout.splitlines()[0].endswith(" --multihost'") == several


def test_create_waits_for_the_slice_and_one_that_was_taken_stays_unless_cleanup(cloud):
    cloud.states.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    result = cloud.run("tpu_vm.sh", "create")
    assert (result.returncode, result.stderr) == (0, "slice: WAITING_FOR_RESOURCES\nslice: PROVISIONING\n")
    cloud.states.write_text("SUSPENDED")
    result = cloud.run("tpu_vm.sh", "create")
    assert (result.returncode, result.stderr) == (1, "error: slice is SUSPENDED: delete it, then create it again\n")
    assert not any("delete" in call for call in cloud.calls)
    assert cloud.run("tpu_vm.sh", "--cleanup", "create").returncode == 1
    assert cloud.calls[-1] == [*TPUS, "queued-resources", "delete", "slice", *WHERE, "--force", "--quiet"]


@pytest.mark.parametrize(("status", "message"), [(0, ""), (143, "stopped by SIGTERM"), (2, "ended with status 2")])
def test_run_gives_the_script_its_words_and_ends_with_its_status(cloud, status, message):
    script = f"import sys; print(sys.argv[1:]); raise SystemExit({status})"
    (cloud.worker / "br_jax" / "script.py").write_text(script)
    words = ["--a=b c", "it's", '"$HOME"', "`x`; exit 3 #", "*", ""]
    for _ in range(2):  # it may be repeated
        result = cloud.run("tpu_vm.sh", "run", "--", "script.py", *words)
        assert (result.returncode, result.stdout) == (status, f"{[*words, '--workdir=/mnt/br_jax/slice']}\n")
        assert message in result.stderr and result.stderr.count("\n") == (status > 0)


def test_stop_reaches_the_script_and_no_second_run_starts_before_its_end(cloud):
    (cloud.worker / "br_jax" / "script.py").write_text(
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "pathlib.Path('ready').touch()\n"
        "signal.pause()\n"
    )
    start = [cloud.worker / "br_jax" / "experiments" / "launch" / "worker.sh", "start", "script.py"]
    subprocess.run(start, check=True)
    while not (cloud.worker / "br_jax" / "ready").exists():
        time.sleep(0.01)
    second = subprocess.run(start, capture_output=True, text=True)
    assert second.returncode == 2 and "a run is under way" in second.stderr
    assert cloud.run("tpu_vm.sh", "stop").returncode == 0
    assert cloud.run("tpu_vm.sh", "logs").returncode == 143


def test_logs_without_a_status_says_what_to_do_and_exec_runs_in_the_project(cloud):
    result = cloud.run("tpu_vm.sh", "logs")
    assert result.returncode == 1 and "no exit status yet: logs follows again" in result.stderr
    assert cloud.run("tpu_vm.sh", "exec", "--", "ls", "experiments").stdout == "launch\n"


@pytest.mark.skipif(shutil.which("envsubst") is None, reason="needs gettext's envsubst")
@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts"),
    [("tpu-v5-lite-podslice", "2x4", 8, 1), ("tpu-v4-podslice", "2x2x4", 4, 4)],
)
def test_the_manifest_asks_for_a_slice_and_is_applied(cloud, accelerator, topology, chips, hosts):
    kind = {"ACCELERATOR": accelerator, "TOPOLOGY": topology, "CHIPS_PER_HOST": str(chips), "NAME": "on", "CLAIM": "7"}
    script = ["experiments/pipeline.py", "--config.name=it's $NAME"]
    dry = cloud.run("gke.sh", "--dry-run", "--", *script, **kind)
    assert (dry.returncode, dry.stderr) == (0, "") and not list(cloud.worker.glob("*.yaml"))
    assert cloud.run("gke.sh", "--", *script, **kind).returncode == 0
    assert (cloud.worker / "arguments").read_text() == "apply --filename=-\n"
    assert (cloud.worker / "manifest.yaml").read_text() == dry.stdout

    manifest = yaml.safe_load(dry.stdout)
    assert manifest["metadata"]["name"] == "on"  # no YAML boolean
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == hosts
    pod = spec["template"]["spec"]
    assert list(pod["nodeSelector"].values()) == [accelerator, topology]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    (container,) = pod["containers"]
    assert container["resources"] == {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")}
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "7"}}]
    workdir = ["--workdir=/mnt/br_jax/on"] + ["--multihost"] * (hosts > 1)
    assert shlex.split(container["args"][0]) == ["exec", "python", *script, *workdir]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ("tpu_vm.sh", {}, "no subcommand: "),
        ("tpu_vm.sh crate", {}, "crate: no such flag or subcommand: "),
        ("tpu_vm.sh create", {"NAME": None}, "NAME is not set: "),
        ("tpu_vm.sh create", {"ACCELERATOR_TYPE": "v5e-8"}, "ACCELERATOR_TYPE v5e-8: not v4-N, "),
        ("tpu_vm.sh run", {"ACCELERATOR_TYPE": "v4-16"}, "SHARED is not set: "),
        ("tpu_vm.sh run --", {}, "run: nothing to run: "),
        ("tpu_vm.sh all -- script.py", {}, "all: no terminal to ask on: add --yes"),
        ("gke.sh --", {}, "nothing to run: "),
        ("gke.sh -- script.py", {"CLAIM": None}, "CLAIM is not set: "),
        ("gke.sh -- script.py", {"IMAGE": 'a" b'}, 'IMAGE a" b: only letters, '),
        ("gke.sh -- script.py", {"TOPOLOGY": "8"}, "TOPOLOGY 8: not like "),
        ("gke.sh -- script.py", {"TOPOLOGY": "2x2"}, "TOPOLOGY 2x2: 4 chips are not whole hosts of 8"),
        ("gke.sh -- script.py", {"CHIPS_PER_HOST": "2"}, "CHIPS_PER_HOST 2: not 1, 4 or 8"),
        ("gke.sh -- script.py", {"MAX_RESTARTS": "x"}, "MAX_RESTARTS x: not a number"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(cloud, arguments, changes, message):
    result = cloud.run(*arguments.split(), **changes)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert cloud.calls == []
