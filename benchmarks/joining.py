"""How soon a newcomer to a run is where the others are: real daemons, a model of 50 MB, a line of 100 Mbit/s.

Four members have trained and merged; they do not train on meanwhile, since all share the cores of one machine. A fifth
comes by the address of one of them, with a line of 100 Mbit/s each way, and needs what the last merge came to: anchor
and momentum, 100 MB. (To a run so young that all differences are still held, it needs these alone.) The time is from
its first connection to the moment its weights are on that anchor; what the bytes need is their number over the line's
rate. It comes three times: with everybody well, with one of the holders killed in the middle, and with one that serves
wrong bytes.

It needs root, for the namespaces. Usage: python -m benchmarks.joining
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from benchmarks.harness import Figure
from benchmarks.home_lines import LOOK_S, Daemon, Line, home_lines
from training.run_spec import parse_run_spec

MBIT_PER_S = 100
MEMBERS = 4
SLOWER_MAX = 1.3
HOLDERS_MIN = 3
ROUNDS_MAX = 2
WAIT_S_MAX = 400.0
MERGES_BEFORE = 5
"""More than those of which members keep the differences."""
KILL_AT = 0.3
"""Of the bytes: then one of the holders dies."""
SPEC = """
name = "joining"
init = "shared"
[model]
layers = 8
width = 352
heads = 4
context = 16
[data]
held_out_bytes = 4096
[train]
steps = 4
batch = 1
[exchange]
every_steps = 2
[schedule]
preset = "final-only"
[merge]
wait_s_max = 20
[outer]
kind = "nesterov"
"""
STATE_BYTES = 8 * parse_run_spec(SPEC).model.parameters
LINE_BYTES_PER_S = MBIT_PER_S * 1e6 / 8


class Joined:
    """How one newcomer fared."""

    def __init__(self, newcomer: Daemon) -> None:
        self._newcomer = newcomer
        self.seconds = 0.0
        self.holders = 0
        self.received = 0
        self.rounds = 0
        self.problems: dict[str, str] = {}

    async def watch(self, victim: Daemon | None) -> None:
        """Until it is on the anchor, and has contributed to a merge."""
        while (caught_up_s := self._newcomer.told_s("caught up")) is None:
            await trio.sleep(LOOK_S)
            status = await self._newcomer.status()
            received = sum(peer.bytes_pulled for peer in status.peers) if status is not None else 0
            if victim is not None and received > KILL_AT * STATE_BYTES:
                victim.kill()
                victim = None
        status = await self._newcomer.until(lambda status: status.last_merge is not None)
        connected_s = self._newcomer.told_s("connected")
        assert connected_s is not None
        self.seconds = caught_up_s - connected_s
        self.received = sum(peer.bytes_pulled for peer in status.peers)
        self.holders = sum(peer.bytes_pulled > STATE_BYTES // 100 for peer in status.peers)
        self.problems = {peer.peer: peer.last_problem for peer in status.peers if peer.last_problem}
        while status.last_merge is None or not status.last_merge.contributed:
            await self._newcomer.merge_now()
            self.rounds += 1
            status = await self._newcomer.until(lambda status: True)


@contextlib.asynccontextmanager
async def _swarm(lines: list[Line], folder: Path, *, liar: bool) -> AsyncIterator[list[Daemon]]:
    """Members that have merged; the last of them serves wrong bytes if there is a ``liar``."""
    spec_file = folder / "run.toml"
    spec_file.write_text(SPEC)
    with contextlib.ExitStack() as running:
        members: list[Daemon] = []
        for number, line in enumerate(lines[:MEMBERS]):
            arguments: list[str | Path] = ["--run", spec_file, "--part", f"{number + 1}/{MEMBERS}"]
            if members:
                arguments += ["--bootstrap", members[0].address]
            program = "benchmarks.lying_holder" if liar and number == MEMBERS - 1 else "cli"
            members.append(running.enter_context(Daemon(line, folder, arguments, program=program)))
        await _until_merged(members)
        yield members


async def _until_merged(members: list[Daemon]) -> None:
    """They merge once at the end of their training, and then as often as they are told to."""
    with trio.move_on_after(WAIT_S_MAX):
        for member in members:
            await member.until(lambda status: status.phase == "finished")
        for _ in range(MERGES_BEFORE):
            await members[0].merge_now()
        return
    raise SystemExit(f"the members did not merge: {members[0].last_words()}")


async def join(lines: list[Line], *, killed: bool = False, liar: bool = False) -> tuple[Joined, list[Daemon]]:
    """One newcomer to a swarm of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with _swarm(lines, folder, liar=liar) as members:
            arguments = ["--run", folder / "run.toml", "--bootstrap", members[0].address]
            with Daemon(lines[MEMBERS], folder, arguments) as newcomer:
                joined = Joined(newcomer)
                with trio.move_on_after(WAIT_S_MAX) as deadline:
                    await joined.watch(members[1] if killed else None)
                if deadline.cancelled_caught:
                    raise SystemExit(f"the newcomer is still not one of them: {newcomer.last_words()}")
    return joined, members


async def measure() -> list[Figure]:
    """Three newcomers."""
    needed_s = STATE_BYTES / LINE_BYTES_PER_S
    figures = []
    with home_lines([0] * MEMBERS + [MBIT_PER_S]) as lines:
        for title, killed, liar in (
            ("all well", False, False),
            ("one killed", True, False),
            ("a liar", False, True),
        ):
            joined, members = await join(lines, killed=killed, liar=liar)
            slower = joined.seconds / needed_s
            figures += [
                Figure(f"{title}: seconds, {needed_s:.1f} for the bytes", "s", (joined.seconds,)),
                Figure(f"{title}: of what the bytes need", "times", (slower,), at_most=SLOWER_MAX),
                Figure(f"{title}: received, of what is needed", "times", (joined.received / STATE_BYTES,)),
                Figure(f"{title}: holders it came from", "", (float(joined.holders),), at_least=HOLDERS_MIN),
                Figure(f"{title}: merges until its part", "", (float(joined.rounds),), at_most=ROUNDS_MAX),
            ]
            if liar:
                named = members[-1].peer in joined.problems
                figures.append(Figure("a liar: named", "", (float(named),), at_least=1))
            for figure in figures[-6 if liar else -5 :]:
                print(figure.line(), flush=True)
            for peer, problem in joined.problems.items():
                print(f"    of {peer[-8:]}: {problem}", flush=True)
    return figures


def main() -> int:
    """Exit 1 when a bar is missed."""
    return 0 if all(figure.met is not False for figure in trio.run(measure)) else 1


if __name__ == "__main__":
    sys.exit(main())
