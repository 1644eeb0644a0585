"""What communication costs training over a home link: two daemons, each in a network namespace and on its own core.

The two are joined by a line of 20 Mbit/s each way (a veth pair, shaped with tbf). In turn each pair of runs is alone,
where nothing is exchanged, and a swarm with the default run (``training.default_run``); the share of inner steps that
the swarm takes less is what training loses to everything else the daemon does. It needs root, for the namespaces, and
two cores.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from benchmarks.harness import Figure, ratios
from cli.node_commands import prepare_home
from node.control import ask
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError
from training.default_run import default_run
from training.run_spec import RunSpec, spec_as_toml
from training.spec_sections import ScheduleSpec, TrainSpec

MBIT_PER_S = 20
WARM_UP_STEPS = 60
"""Until the first exchanges are over and both know each other."""
WINDOW_S = 90.0
START_S_MAX = 90.0
LOOK_S = 0.5
PORT = 4100
SPACES = ("gossamer-a", "gossamer-b")
ADDRESSES = ("10.78.0.1", "10.78.0.2")


class NeedsRoot(GossamerError):
    """Network namespaces could not be made."""


@contextlib.contextmanager
def home_line() -> Iterator[None]:
    """Two network namespaces and the line between them, for as long as the block lasts. Raises NeedsRoot."""
    _unmake()
    try:
        for space in SPACES:
            _ip("netns", "add", space)
        _ip("link", "add", "gsm-a", "netns", SPACES[0], "type", "veth", "peer", "gsm-b", "netns", SPACES[1])
        for space, link, address in zip(SPACES, ("gsm-a", "gsm-b"), ADDRESSES, strict=True):
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", link, "up")
            shape = ["rate", f"{MBIT_PER_S}mbit", "burst", "64kb", "latency", "200ms"]
            _run("tc", "-n", space, "qdisc", "add", "dev", link, "root", "tbf", *shape)
        yield
    finally:
        _unmake()


def _unmake() -> None:
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NeedsRoot(
            f"{' '.join(command)}: {done.stderr.strip()}",
            why="the line between the two daemons is one between network namespaces",
            fix="run it as root, with iproute2 installed",
        )


class Pair:
    """Two daemons, one in each namespace, each on a core of its own."""

    def __init__(self, folder: Path, spec: RunSpec, *, together: bool) -> None:
        self._folder = folder
        self._spec_file = folder / "run.toml"
        self._spec_file.write_text(spec_as_toml(spec))
        self._together = together
        self._homes = [Home.at(folder / space) for space in SPACES]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Pair:
        peers = [prepare_home(home)[0] for home in self._homes]
        for core, (space, home, address) in enumerate(zip(SPACES, self._homes, ADDRESSES, strict=True)):
            command = ["ip", "netns", "exec", space, "taskset", "-c", str(core)]
            command += [sys.executable, "-P", "-m", "cli", "run", "--home", str(home.data_folder)]
            command += ["--run", str(self._spec_file), "--part", f"{core + 1}/2", "--threads", "1"]
            command += ["--listen", f"/ip4/{address}/tcp/{PORT}", "--parent", str(os.getpid())]
            if core and self._together:
                command += ["--bootstrap", f"/ip4/{ADDRESSES[0]}/tcp/{PORT}/p2p/{peers[0]}"]
            with (self._folder / f"{space}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                    )
                )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    async def steps_per_s(self) -> float:
        """Inner steps per second of both together, in a window after the start."""
        for _ in range(int(START_S_MAX / LOOK_S)):
            if min(await self._steps()) >= WARM_UP_STEPS:
                break
            await trio.sleep(LOOK_S)
        else:
            raise SystemExit(f"the daemons did not get under way: {self._last_words()}")
        before, began_s = await self._steps(), trio.current_time()
        await trio.sleep(WINDOW_S)
        after = await self._steps()
        return (sum(after) - sum(before)) / (trio.current_time() - began_s)

    def _last_words(self) -> str:
        return " / ".join(
            (self._folder / f"{space}.log").read_text(errors="replace")[-300:] for space in SPACES
        )

    async def traffic(self) -> tuple[int, int]:
        """Bytes sent by both, and what they have mixed and merged."""
        statuses = [await self._status(home) for home in self._homes]
        known = [status for status in statuses if status is not None]
        return sum(s.bytes_sent for s in known), sum(s.mixes + s.merges for s in known)

    async def _steps(self) -> list[int]:
        statuses = [await self._status(home) for home in self._homes]
        return [status.step if status is not None else 0 for status in statuses]

    async def _status(self, home: Home) -> NodeStatus | None:
        try:
            return await ask(home.control_socket, "status", result_type=NodeStatus, timeout_s=10)
        except GossamerError:
            return None


async def measure(repeats: int = 3) -> list[Figure]:
    """Steps per second alone and together, in turn."""
    default = msgspec.structs.replace(default_run("overlap"), train=TrainSpec(steps=20_000))
    quiet = msgspec.structs.replace(default, schedule=ScheduleSpec(preset="final-only"))
    alone: list[float] = []
    together: list[float] = []
    sent: list[float] = []
    with home_line():
        for _ in range(repeats):
            for spec, rates in ((quiet, alone), (default, together)):
                with (
                    tempfile.TemporaryDirectory() as folder,
                    Pair(Path(folder), spec, together=spec is default) as pair,
                ):
                    rates.append(await pair.steps_per_s())
                    if spec is default:
                        sent.append((await pair.traffic())[0] / 1e6)
    lost = tuple(100 * (1 - ratio) for ratio in ratios(together, alone))
    return [
        Figure("inner steps alone, two daemons on a core each", "1/s", tuple(alone)),
        Figure("inner steps together, 20 Mbit/s between them", "1/s", tuple(together)),
        Figure("  sent by both meanwhile", "MB", tuple(sent)),
        Figure("training lost to communication", "%", lost, at_most=3.0),
    ]
