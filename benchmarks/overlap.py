"""What communication costs training over a home link: two daemons, each in a network namespace and on its own core.

The two are joined by a line of 20 Mbit/s each way. In turn each pair of runs is alone, where nothing is exchanged, and
a swarm with the default run (``training.default_run``); the share of inner steps that the swarm takes less is what
training loses to everything else the daemon does. It needs root, for the namespaces, and two cores.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import trio

from benchmarks.harness import Figure, ratios
from benchmarks.home_lines import Daemon, Line, home_lines
from training.default_run import default_run
from training.run_spec import RunSpec, spec_as_toml
from training.spec_sections import ScheduleSpec, TrainSpec

MBIT_PER_S = 20
WARM_UP_STEPS = 60
"""Until the first exchanges are over and both know each other."""
WINDOW_S = 90.0
START_S_MAX = 90.0
LOOK_S = 0.5


@contextlib.contextmanager
def pair(lines: Sequence[Line], folder: Path, spec: RunSpec, *, together: bool) -> Iterator[list[Daemon]]:
    """Two daemons, each on a line and a core of its own."""
    spec_file = folder / "run.toml"
    spec_file.write_text(spec_as_toml(spec))
    with contextlib.ExitStack() as running:
        daemons: list[Daemon] = []
        for core, line in enumerate(lines):
            arguments = ["--run", spec_file, "--part", f"{core + 1}/2"]
            if core and together:
                arguments += ["--bootstrap", daemons[0].address]
            daemons.append(running.enter_context(Daemon(line, folder, arguments, core=core)))
        yield daemons


async def steps_per_s(daemons: Sequence[Daemon]) -> float:
    """Inner steps per second of both together, in a window after the start."""
    for _ in range(int(START_S_MAX / LOOK_S)):
        if min(await _steps(daemons)) >= WARM_UP_STEPS:
            break
        await trio.sleep(LOOK_S)
    else:
        words = " / ".join(daemon.last_words() for daemon in daemons)
        raise SystemExit(f"the daemons did not get under way: {words}")
    before, began_s = await _steps(daemons), trio.current_time()
    await trio.sleep(WINDOW_S)
    after = await _steps(daemons)
    return (sum(after) - sum(before)) / (trio.current_time() - began_s)


async def _steps(daemons: Sequence[Daemon]) -> list[int]:
    statuses = [await daemon.status() for daemon in daemons]
    return [status.step if status is not None else 0 for status in statuses]


async def measure(repeats: int = 3) -> list[Figure]:
    """Steps per second alone and together, in turn."""
    default = msgspec.structs.replace(default_run("overlap"), train=TrainSpec(steps=20_000))
    quiet = msgspec.structs.replace(default, schedule=ScheduleSpec(preset="final-only"))
    alone: list[float] = []
    together: list[float] = []
    sent: list[float] = []
    with home_lines([MBIT_PER_S, MBIT_PER_S]) as lines:
        for _ in range(repeats):
            for spec, rates in ((quiet, alone), (default, together)):
                with (
                    tempfile.TemporaryDirectory() as folder,
                    pair(lines, Path(folder), spec, together=spec is default) as daemons,
                ):
                    rates.append(await steps_per_s(daemons))
                    if spec is default:
                        statuses = [await daemon.status() for daemon in daemons]
                        sent.append(sum(status.bytes_sent for status in statuses if status) / 1e6)
    lost = tuple(100 * (1 - ratio) for ratio in ratios(together, alone))
    return [
        Figure("inner steps alone, two daemons on a core each", "1/s", tuple(alone)),
        Figure("inner steps together, 20 Mbit/s between them", "1/s", tuple(together)),
        Figure("  sent by both meanwhile", "MB", tuple(sent)),
        Figure("training lost to communication", "%", lost, at_most=3.0),
    ]
