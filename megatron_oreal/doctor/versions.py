"""Checks the installed packages against the requirements in this package's metadata."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_oreal.doctor.findings import Finding, error, ok

PACKAGE = "megatron_oreal"
SHOWN = ("torch", "megatron-core", "transformers")
INSTALL = "run tools/setup_env.sh, or pip install . in the checkout"


def read_requirements(extra: str = "") -> list[Requirement]:
    """Returns the package's requirements here, or those of an extra. Raises ValueError if it is not installed."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        raise ValueError(f"{PACKAGE} is not installed as a package, so its pins are unknown; {INSTALL}") from None
    found = [Requirement(line) for line in lines]
    base = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return base
    return [
        one for one in found if one not in base and one.marker is not None and one.marker.evaluate({"extra": extra})
    ]


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions(
    requirements: Sequence[Requirement] | None = None, installed: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """Yields an error for each requirement that is not met. Pre-releases, as in NGC's images, also count."""
    requirements = read_requirements() if requirements is None else requirements
    python = SpecifierSet(metadata(PACKAGE)["Requires-Python"] or "")
    if not python.contains(platform.python_version(), prereleases=True):
        yield error("python", f"Python {platform.python_version()} is not {python}", "make .venv with another PYTHON")
    versions = {one.name: installed(one.name) for one in requirements}
    unmet = [one for one in requirements if not is_met(one, versions[one.name])]
    for one in unmet:
        yield error("packages", f"{one.name} {versions[one.name] or 'is missing'}", f"needed: {one}; {INSTALL}")
    if not unmet:
        named = ", ".join(f"{name} {versions[name]}" for name in SHOWN if versions.get(name))
        yield ok("packages", f"Python {platform.python_version()}, {named}; all {len(requirements)} requirements hold")


def is_met(requirement: Requirement, found: str | None) -> bool:
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def version_facts() -> dict[str, str]:
    """Returns the versions that must be equal on all ranks."""
    found = {name: installed_version(name) for name in (PACKAGE, *SHOWN, "transformer-engine", "numpy")}
    return {"python": platform.python_version()} | {name: each for name, each in found.items() if each is not None}


def compare_versions(by_host: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Yields an error for each package whose version differs between hosts."""
    for name in sorted({name for versions in by_host.values() for name in versions}):
        found: dict[str, str] = {}
        for host, versions in by_host.items():
            found.setdefault(versions.get(name, "none"), host)
        if len(found) > 1:
            words = ", ".join(f"{each} on {host}" for each, host in found.items())
            yield error("packages", f"hosts have several versions of {name}: {words}", "install the same everywhere")
