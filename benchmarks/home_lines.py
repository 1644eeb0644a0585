"""Machines with a home line each, on this one: network namespaces on one switch, every line shaped both ways.

Owns the namespaces, which are gone after the block, and the daemons in them. It needs root on Linux, with iproute2.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import trio

from cli.node_commands import prepare_home
from node.control import MergeNow, ask
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError

PORT = 4100
SWITCH = "gossamer-switch"
STOP_S_MAX = 20.0
LOOK_S = 0.1
MERGE_S_MAX = 120.0


class NeedsRoot(GossamerError):
    """Network namespaces could not be made."""


@contextlib.contextmanager
def home_lines(mbit_per_s: Sequence[float]) -> Iterator[list[Line]]:
    """A machine for each of ``mbit_per_s``, what its line carries each way; 0: as much as it can. Raises NeedsRoot."""
    lines = [Line(f"gossamer-{number}", f"10.78.0.{number}") for number in range(1, len(mbit_per_s) + 1)]
    spaces = [SWITCH, *(line.space for line in lines)]
    _unmake(spaces)
    try:
        for space in spaces:
            _run("ip", "netns", "add", space)
        _run("ip", "-n", SWITCH, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", SWITCH, "link", "set", "switch", "up")
        for number, (line, rate) in enumerate(zip(lines, mbit_per_s, strict=True), start=1):
            ends = ((SWITCH, f"port{number}"), (line.space, "eth0"))
            (_, port), (space, card) = ends
            _run("ip", "-n", SWITCH, "link", "add", port, "type", "veth", "peer", card, "netns", space)
            _run("ip", "-n", SWITCH, "link", "set", port, "master", "switch", "up")
            _run("ip", "-n", space, "addr", "add", f"{line.address}/24", "dev", card)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", card, "up")
            for where, device in ends if rate else ():
                shape = ["rate", f"{rate:g}mbit", "burst", "64kb", "latency", "200ms"]
                _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", *shape)
        yield lines
    finally:
        _unmake(spaces)


@dataclass(frozen=True, slots=True)
class Line:
    """Where a machine is: its namespace and its address there."""

    space: str
    address: str


class Daemon:
    """``gossamer run`` on a line, in a home below ``folder``; killed at the end of the block.

    ``program``: the module that is run; another one than the product's may be hostile.
    """

    def __init__(
        self,
        line: Line,
        folder: Path,
        arguments: Sequence[str | Path],
        *,
        core: int | None = None,
        program: str = "cli",
    ) -> None:
        self._line = line
        self._home = Home.at(folder / line.space)
        self._log = folder / f"{line.space}.log"
        self.peer = prepare_home(self._home)[0]
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        self._command = [
            "ip",
            "netns",
            "exec",
            line.space,
            *pinned,
            sys.executable,
            "-P",
            "-m",
            program,
            "run",
        ]
        self._command += ["--home", str(self._home.data_folder), "--threads", "1"]
        self._command += ["--listen", f"/ip4/{line.address}/tcp/{PORT}", "--parent", str(os.getpid())]
        self._command += map(str, arguments)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where others reach it."""
        return f"/ip4/{self._line.address}/tcp/{PORT}/p2p/{self.peer}"

    def __enter__(self) -> Daemon:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_S_MAX)

    async def status(self) -> NodeStatus | None:
        """What it says of itself; None while it does not answer."""
        try:
            return await ask(self._home.control_socket, "status", result_type=NodeStatus, timeout_s=10)
        except GossamerError:
            return None

    async def until(self, condition: Callable[[NodeStatus], bool]) -> NodeStatus:
        """Its status, as soon as ``condition`` holds for it."""
        while True:
            status = await self.status()
            if status is not None and condition(status):
                return status
            await trio.sleep(LOOK_S)

    async def merge_now(self) -> None:
        """Ask it for a global merge. Raises GossamerError."""
        await ask(self._home.control_socket, "merge_now", MergeNow(), timeout_s=MERGE_S_MAX)

    def told_s(self, event: str) -> float | None:
        """When its log first told of ``event``, in Unix time; None: it has not."""
        for line in self._log.read_text(errors="replace").splitlines():
            with contextlib.suppress(msgspec.MsgspecError):
                told = msgspec.json.decode(line, type=dict[str, Any])
                if told.get("event") == event:
                    return datetime.fromisoformat(told["ts"]).timestamp()
        return None

    def last_words(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-600:]


def _unmake(spaces: Sequence[str]) -> None:
    for space in spaces:
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NeedsRoot(
            f"{' '.join(command)}: {done.stderr.strip()}",
            why="the lines between the daemons are those between network namespaces",
            fix="run it as root, with iproute2 installed",
        )
