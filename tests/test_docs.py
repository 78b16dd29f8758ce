"""The pages for people: their links lead somewhere, the files that they name exist, and the site builds."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")
FILE = re.compile(r"(?<![\w/.])(?:br_jax|colab|configs|docs|experiments|tests)/[\w./-]*\w")
MODEL = "br_jax/tiny"  # a name, not a path


def test_links_and_images_of_the_readme_resolve():
    found = [link or image for link, image in LINK.findall((ROOT / "README.md").read_text())]
    assert found
    local = [target for target in found if not re.match(r"[a-z]+:", target)]
    assert not [target for target in local if not (ROOT / target.partition("#")[0]).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = set(FILE.findall(page.read_text())) - {MODEL}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings_handlers"))),
    reason="the extra `docs` is not installed: make docs",
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", os.fspath(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api" / "index.html").read_text().count("train_user")
