"""Downloads by TFDS's manager, with errors in one line: it retries for minutes, and tells much of its own."""

import hashlib
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from br_jax.distributed import is_main
from br_jax.errors import UserError

TIMEOUT = 20  # seconds to a connection, and to the first byte
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicFile:
    """A file of a data set's public home.

    Attributes:
        url: pinned to a revision.
        sha256: of the file; None where it could not be known, and then that of what came is logged.
        size: bytes, where known; a matching sha256 makes it redundant, so it is only told.
        member: the file wanted, where the url is that of a zip archive.
    """

    url: str
    sha256: str | None = None
    size: int | None = None
    member: str | None = None


@dataclass(frozen=True)
class Origin:
    """Whose data it is.

    Attributes:
        license: what it may be used under, in a few words.
        homepage: where access and terms are explained.
        citation: authors, title, year.
        files: split -> its file; empty where there is nothing to download.
    """

    license: str
    homepage: str
    citation: str
    files: Mapping[str, PublicFile] = field(default_factory=dict)


def download(manager: tfds.download.DownloadManager, name: str, origin: Origin) -> dict[str, Path]:
    """Downloads a data set's files; the license is told before.

    Args:
        manager: verifies the sha256 of each file that has one.
        name: of the data set, for messages.
        origin: the files.

    Returns:
        Split -> the file.

    Raises:
        UserError: no network, no such file, no access, a file that is not the one pinned.
    """
    urls = {file.url: file.sha256 for file in origin.files.values()}
    sizes = {file.url: f"{file.size / 1e6:.1f} MB" if file.size else "size unknown" for file in origin.files.values()}
    announce(name, ", ".join(f"{url} ({size})" for url, size in sizes.items()), origin)
    for url in urls:
        _require_reachable(url, origin.homepage)
    paths = _download(manager, urls, origin.homepage)
    for url, sha256 in urls.items():
        if sha256 is None:
            with open(paths[url], "rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            logger.warning("%s: no checksum is known of %s: what came has sha256 %s", name, url, got)
    return {split: paths[file.url] for split, file in origin.files.items()}


def announce(name: str, what: str, origin: Origin) -> None:
    """Tells what is about to be downloaded, and under which license."""
    logger.warning("%s: downloading %s; license: %s (%s)", name, what, origin.license, origin.homepage)


def _require_reachable(url: str, homepage: str) -> None:
    """Asks for a file and leaves it, to know within seconds what the manager would need minutes for."""
    by_hand = f"or download it by hand from {homepage} and give path="
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as response:
            status = response.status_code
    except requests.RequestException as error:
        reason = type(error).__name__
        raise UserError(f"{url}: cannot be reached ({reason}): check the network, {by_hand}") from error
    if status in (401, 403):
        raise UserError(
            f"{url}: HTTP {status}: the files are for those who asked for access: open {homepage}, accept its terms, "
            "download the file by hand and give path="
        )
    if status != 200:
        raise UserError(f"{url}: HTTP {status}: the server does not give this file now: try again later, {by_hand}")


def _download(manager: tfds.download.DownloadManager, urls: Mapping[str, str | None], homepage: str) -> dict[str, Path]:
    tfds.display_progress_bar(is_main() and sys.stderr.isatty())
    try:
        return manager.download({url: url for url in urls})
    except NonMatchingChecksumError as error:
        url, *_ = (url for url in urls if url in str(error))
        *_, got = re.findall(r"checksum='(\w+)'", str(error))
        raise UserError(
            f"{url}: sha256 mismatch: expected {urls[url]}, got {got}: nothing was kept: look at {homepage}"
        ) from error
    except (requests.RequestException, DownloadError) as error:
        raise UserError(
            f"{', '.join(urls)}: the download broke off ({type(error).__name__}): try again, or download by hand from "
            f"{homepage} and give path="
        ) from error
    finally:
        tfds.display_progress_bar(True)
