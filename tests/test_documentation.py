"""The pages that a stranger reads: their snippets run, their links lead somewhere, and no package lacks its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = ("megatron_oreal", "docs", "examples", "tools", "docker", "tests", ".github")
PAGES = sorted([ROOT / "README.md", *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAX_README_LINES = 150
MAX_MODULES_WITHOUT_PAGE = 5


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(page.read_text())], ids=name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    for snippet in SNIPPET.findall(page.read_text()):
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{snippet}\n{run.stderr[-3000:]}"


def test_the_page_of_a_package_names_every_module() -> None:
    """As a file, as code in backticks, or in a list of names within braces."""
    missing = []
    for page in (ROOT / "megatron_oreal").rglob("README.md"):
        text = page.read_text()
        for module in page.parent.glob("*.py"):
            if module.name != "__init__.py" and not re.search(rf"\b{module.stem}(\.py\b|`|,|\}})", text):
                missing.append(str(module.relative_to(ROOT)))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link and not link.startswith("#")]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_every_large_package_has_a_page() -> None:
    packages = {path.parent for path in (ROOT / "megatron_oreal").rglob("*.py")}
    large = [
        package
        for package in packages
        if len([path for path in package.glob("*.py") if path.name != "__init__.py"]) > MAX_MODULES_WITHOUT_PAGE
    ]
    assert not [name(package) for package in large if not (package / "README.md").is_file()]


def test_every_example_has_a_page() -> None:
    examples = [folder for folder in (ROOT / "examples").iterdir() if folder.is_dir() and any(folder.iterdir())]
    assert not [folder.name for folder in examples if not (folder / "README.md").is_file()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_tell_no_history(page: Path) -> None:
    """A figure belongs to a commit that is named, not to a day that the reader does not know."""
    history = re.compile(r"\b(today|yesterday|later that day|a few commits before|a slower hour)\b", re.I)
    assert not history.findall(page.read_text())
