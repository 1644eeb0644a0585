"""Checks of what is installed: Python, the packages that the project needs, and that its own are the ones imported."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires
from importlib.metadata import version as version_of
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cli.checks.finding import Finding, Subject

DISTRIBUTION = "gossamer"
OUR_PACKAGES = ("p2p", "gossip", "training", "node", "netsim", "cli")
_WHY_PACKAGES = "with other versions a node may fail in the middle of a run, or speak another protocol"


def check_python(_: Subject) -> Sequence[Finding]:
    """The interpreter against what the project's metadata asks for."""
    try:
        needed = metadata(DISTRIBUTION)["Requires-Python"]
    except PackageNotFoundError:
        return [_unknown("python")]
    running = platform.python_version()
    fits = Requirement(f"python{needed}").specifier.contains(running, prereleases=True)
    return [
        Finding(
            check="python",
            level="ok" if fits else "fail",
            found=f"Python {running} at {sys.executable}; needed: {needed}",
            why="" if fits else "the program uses what older versions do not have",
            fix="" if fits else "make a new environment: python3.11 -m venv .venv    and install into it",
        )
    ]


def check_packages(_: Subject) -> Sequence[Finding]:
    """Every package that is needed, by the project or by what it needs, is there in a version that fits."""
    try:
        required = list(_requirements())
    except PackageNotFoundError:
        return [_unknown("packages")]
    wrong = [
        (needed_by, requirement, found)
        for needed_by, requirement, found in required
        if found is None or not requirement.specifier.contains(found, prereleases=True)
    ]
    if not wrong:
        count = len({requirement.name for _, requirement, _ in required})
        return [Finding(check="packages", level="ok", found=f"{count} packages, all in versions that fit")]
    told = [
        f"{requirement.name} is {found or 'missing'}, {needed_by} needs {requirement.specifier or 'it'}"
        for needed_by, requirement, found in wrong
    ]
    install = sorted({f"{requirement.name}{requirement.specifier}" for _, requirement, _ in wrong})
    return [
        Finding(
            check="packages",
            level="fail",
            found="; ".join(told),
            why=_WHY_PACKAGES,
            fix=shlex.join([sys.executable, "-m", "pip", "install", *install]),
        )
    ]


def check_modules(_: Subject) -> Sequence[Finding]:
    """Our packages have common names: one of another project that comes first would be imported instead."""
    ours = Path(__file__).resolve().parents[2]
    strangers = {
        name: str(found.origin)
        for name in OUR_PACKAGES
        if (found := importlib.util.find_spec(name)) is not None
        and found.origin is not None
        and Path(found.origin).resolve().parents[1] != ours
    }
    if not strangers:
        return [Finding(check="modules", level="ok", found=f"all from {ours}")]
    return [
        Finding(
            check="modules",
            level="fail",
            found=", ".join(f"{name} is {origin}" for name, origin in strangers.items()),
            why="another project's package of the same name is imported in place of ours",
            fix="give gossamer an environment of its own: python3 -m venv .venv    and clear PYTHONPATH",
        )
    ]


def _requirements() -> Iterator[tuple[str, Requirement, str | None]]:
    """Who needs what, and the version that is installed; everything that the project needs, directly or not."""
    pending, seen = [(DISTRIBUTION, frozenset[str]())], set()
    while pending:
        name, extras = pending.pop()
        for text in requires(name) or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": e}) for e in extras | {""}):
                continue
            found = installed_version(requirement.name)
            yield name, requirement, found
            needed = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if found is not None and needed not in seen:
                seen.add(needed)
                pending.append(needed)


def installed_version(name: str) -> str | None:
    """The version of an installed package; None when it is not there."""
    try:
        return version_of(name)
    except PackageNotFoundError:
        return None


def _unknown(check: str) -> Finding:
    return Finding(
        check=check,
        level="warn",
        found="gossamer runs from a folder and is not installed, so what it needs is not known here",
        why=_WHY_PACKAGES,
        fix="in the folder of the sources: pip install -c constraints.txt -e .",
    )
