"""What communication costs training over a home link: two daemons, each in a network namespace and on its own core.

The two are joined by a line of 20 Mbit/s each way. In turn each pair of runs is alone, where nothing is exchanged, and
a swarm with the default run (``training.default_run``), from its start to its end, so that merges are as frequent as
they are in life. The share of inner steps that the swarm takes less in a second is what training loses to everything
else the daemon does. It needs root, for the namespaces, and two cores.
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
from training.spec_sections import ScheduleSpec

MBIT_PER_S = 20
WARM_UP_STEPS = 20
"""Until both know each other and the first merges are over."""
LAST_STEPS = 10
"""Near its end a run waits for others."""
START_S_MAX = 90.0
RUN_S_MAX = 900.0
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


async def steps_per_s(daemons: Sequence[Daemon], steps: int) -> float:
    """Inner steps per second of each, in a run of so many, but for its very start and end."""
    began_at = await _reach(daemons, WARM_UP_STEPS, START_S_MAX)
    began_s = trio.current_time()
    ended_at = await _reach(daemons, steps - LAST_STEPS, RUN_S_MAX)
    return (ended_at - began_at) / (trio.current_time() - began_s)


async def _reach(daemons: Sequence[Daemon], step: int, timeout_s: float) -> float:
    """The step of both on average, as soon as one of them has reached ``step``."""
    with trio.move_on_after(timeout_s):
        while True:
            steps = await _steps(daemons)
            if max(steps) >= step:
                return sum(steps) / len(steps)
            await trio.sleep(LOOK_S)
    words = " / ".join(daemon.last_words() for daemon in daemons)
    raise SystemExit(f"the daemons did not reach step {step}: {words}")


async def _steps(daemons: Sequence[Daemon]) -> list[int]:
    statuses = [await daemon.status() for daemon in daemons]
    return [status.step if status is not None else 0 for status in statuses]


async def measure(repeats: int = 3) -> list[Figure]:
    """Steps per second alone and together, in turn."""
    default = default_run("overlap")
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
                    rates.append(await steps_per_s(daemons, spec.train.steps))
                    if spec is default:
                        statuses = [await daemon.status() for daemon in daemons]
                        sent.append(sum(status.bytes_sent for status in statuses if status) / 1e6)
    lost = tuple(100 * (1 - ratio) for ratio in ratios(together, alone))
    return [
        Figure("inner steps of a daemon alone, two of them on a core each", "1/s", tuple(alone)),
        Figure("inner steps of it in a swarm, 20 Mbit/s between them", "1/s", tuple(together)),
        Figure("  sent by both meanwhile", "MB", tuple(sent)),
        Figure("training lost to communication", "%", lost, at_most=3.0),
    ]
