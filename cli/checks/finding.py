"""What a check is given and what it finds, and how checks are run: side by side, bounded, none able to stop another.

Owns the time that a check may take, and what becomes of one that breaks. Never decides what is right.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import trio

from node.config import NodeConfig
from node.home import Home
from p2p.errors import GossamerError
from p2p.swarm_key import SwarmKey

CHECK_S_MAX = 90.0
"""Importing torch on a slow disk, and waking an accelerator, take most of it."""

Level = Literal["ok", "warn", "fail", "skip"]
"""``skip``: it could not be checked, and the finding says why."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check came to: what was found, why it matters, and what to type."""

    check: str
    level: Level
    found: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The machine and the home that are looked at."""

    home: Home
    config: NodeConfig
    """The settings in force; the defaults where they cannot be read."""
    environ: Mapping[str, str]
    run: bytes | None
    """The run that peers are asked about."""
    bootstrap: Sequence[str]
    """Addresses to try, each ending in ``/p2p/<peer id>``, beside those that the home remembers."""
    now_unix_s: float
    swarm_key: SwarmKey | None = None
    """With which they are dialled, where their swarm is private."""


Check = Callable[[Subject], Awaitable[Sequence[Finding]]]


async def examine(
    subject: Subject, checks: Mapping[str, Check], *, timeout_s: float = CHECK_S_MAX
) -> list[Finding]:
    """The findings of ``checks``, all run at once, in the order of ``checks``."""
    found: dict[str, Sequence[Finding]] = {}

    async def run(name: str, check: Check) -> None:
        found[name] = await _bounded(name, check, subject, timeout_s)

    async with trio.open_nursery() as nursery:
        for name, check in checks.items():
            nursery.start_soon(run, name, check)
    return [finding for name in checks for finding in found[name]]


async def _bounded(name: str, check: Check, subject: Subject, timeout_s: float) -> Sequence[Finding]:
    try:
        with trio.fail_after(timeout_s):
            return await check(subject)
    except trio.TooSlowError:
        return [
            Finding(
                check=name,
                level="fail",
                found=f"no answer within {timeout_s:g} s",
                why="a disk, a driver or a network that hangs would hold up a node as well",
                fix="look at the machine's own log: dmesg | tail",
            )
        ]
    except GossamerError as error:
        return [failure(name, error)]
    except Exception as error:
        return [
            Finding(
                check=name,
                level="fail",
                found=f"the check itself failed: {type(error).__name__}: {error}",
                why="this is a bug in gossamer, not something you did",
                fix="please report it with: gossamer doctor --bundle report.zip",
            )
        ]


def failure(check: str, error: GossamerError) -> Finding:
    """An error that says everything already, as a finding."""
    return Finding(check=check, level="fail", found=error.what, why=error.why, fix=error.fix)


def in_thread(look: Callable[[Subject], Sequence[Finding]]) -> Check:
    """A check that blocks. One that hangs is left behind: its thread does not keep the program from ending."""

    async def check(subject: Subject) -> Sequence[Finding]:
        return await trio.to_thread.run_sync(look, subject, abandon_on_cancel=True)  # type: ignore[call-arg]

    return check
