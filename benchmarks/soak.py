"""A swarm that is not left alone, for as long as it takes: what it does to two members that are.

    python -m benchmarks.soak [--minutes N] [--seed N] [--folder DIR]

Eight real processes on loopback train and merge every ten seconds or so. Every 20 to 40 s one of six is killed, stopped
in order, paused for a while, or started again; at least five of eight are always up, so a quorum lives all the time.
Two observers are never touched. Measured are the gaps between merges, whether two members ever hold different weights
for one merge, and of the observers memory, open files and tasks, after a warm-up of a fifth of the time. What was seen
is in ``FOLDER/soak.jsonl``, a line for every look. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import msgspec
import psutil
import trio
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import Figure
from cli.node_process import NodeProcess, free_ports

NODES, OBSERVERS, UP_MIN = 8, 2, 5
PAUSE_S = (20.0, 40.0)
DOWN_S = (5.0, 60.0)
FROZEN_S = (5.0, 30.0)
LOOK_S = 5.0
START_S_MAX = 180.0
WARM_UP_SHARE = 0.2
GAP_S_MAX = 60.0
SLOPE_MB_PER_H_MAX = 5.0
GROWTH_MAX = 10
"""Of open files and tasks, between the first and the last quarter after the warm-up, by their medians."""

SPEC = """
name = "soak"
[model]
layers = 1
width = 32
heads = 2
context = 32
[data]
held_out_bytes = 16384
[train]
steps = 64000000
batch = 4
[exchange]
every_steps = 400
[schedule]
preset = "custom"
phases = [{phases}]
[merge]
wait_s_max = 10
"""


class Look(msgspec.Struct, frozen=True):
    """An observer at one moment."""

    at_s: float
    name: str
    memory_bytes: int
    files: int
    tasks: int
    height: int


class Watch:
    """What the looks come to."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.looks: list[Look] = []
        self.hashes: dict[str, dict[str, str]] = {}
        """By record and member, the hash of the weights it stands for."""
        self.merged_s: list[float] = []

    async def look(self, nodes: Sequence[NodeProcess], ports: Sequence[int], began_s: float) -> None:
        """Ask everybody who is up."""
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(node.look)
        at_s = trio.current_time() - began_s
        for node in nodes:
            merge = node.status.last_merge if node.status is not None else None
            if merge is not None:
                self.hashes.setdefault(merge.record, {})[node.name] = merge.weights_hash
        for node, port in zip(nodes[:OBSERVERS], ports, strict=True):
            look = await self._look_at(node, port, at_s)
            if node is nodes[0] and look.height > max((each.height for each in self.looks), default=0):
                self.merged_s.append(at_s)
            self.looks.append(look)
            with self._file.open("ab") as out:
                out.write(msgspec.json.encode(look) + b"\n")

    async def _look_at(self, node: NodeProcess, port: int, at_s: float) -> Look:
        def scrape() -> str:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text: str = answer.read().decode()
                return text

        told = {
            sample.name: sample.value
            for family in text_string_to_metric_families(await trio.to_thread.run_sync(scrape))
            for sample in family.samples
        }
        process = psutil.Process(node.row().pid)
        return Look(
            at_s,
            node.name,
            process.memory_info().rss,
            process.num_fds(),
            int(told["gossamer_trio_tasks"]),
            int(told.get("gossamer_merge_height", 0)),
        )

    @property
    def unequal(self) -> int:
        """Merges for which two members hold different weights."""
        return sum(len(set(of.values())) > 1 for of in self.hashes.values())

    def gap_s(self, until_s: float) -> float:
        """The longest time without a merge, the one that still goes on included."""
        moments = [*self.merged_s, until_s]
        gaps = (later - earlier for earlier, later in itertools.pairwise(moments))
        return max(gaps, default=until_s)

    def figures(self, until_s: float) -> list[Figure]:
        """All that has a bar, and some that have none."""
        found = [
            Figure("merges", "", (float(len(self.hashes)),)),
            Figure("longest time without a merge", "s", (self.gap_s(until_s),), at_most=GAP_S_MAX),
            Figure("merges with unequal weights", "", (float(self.unequal),), at_most=0),
        ]
        for name in sorted({look.name for look in self.looks}):
            of = [look for look in self.looks if look.name == name and look.at_s >= WARM_UP_SHARE * until_s]
            slope = statistics.linear_regression(
                [look.at_s / 3600 for look in of], [look.memory_bytes / 1e6 for look in of]
            ).slope
            memory = tuple(look.memory_bytes / 1e6 for look in of)
            found += [
                Figure(f"{name}: memory", "MB", memory),
                Figure(f"{name}: memory grows by", "MB/h", (slope,), at_most=SLOPE_MB_PER_H_MAX),
                _growth(f"{name}: open files", [look.files for look in of]),
                _growth(f"{name}: tasks", [look.tasks for look in of]),
            ]
        return found


def _growth(name: str, counts: Sequence[int]) -> Figure:
    quarter = max(1, len(counts) // 4)
    before, after = statistics.median(counts[:quarter]), statistics.median(counts[-quarter:])
    return Figure(f"{name}, {before:g} at first: grow by", "", (after - before,), at_most=GROWTH_MAX)


class Trouble:
    """Makes it: one of the touched members after another is killed, stopped, paused or started again."""

    def __init__(self, nodes: Sequence[NodeProcess], rng: random.Random) -> None:
        self._nodes = nodes
        self._rng = rng
        self._away: set[str] = set()
        self.count = 0

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._rng.uniform(*PAUSE_S))
                fit = [node for node in self._nodes[OBSERVERS:] if node.name not in self._away]
                if len(self._nodes) - len(self._away) <= UP_MIN or not fit:
                    continue
                victim = self._rng.choice(fit)
                self._away.add(victim.name)
                self.count += 1
                nursery.start_soon(self._trouble, victim, self._rng.choice(["kill", "stop", "pause"]))

    async def _trouble(self, node: NodeProcess, kind: str) -> None:
        pid = node.row().pid
        if kind == "pause" and pid is not None:
            os.kill(pid, signal.SIGSTOP)
            await trio.sleep(self._rng.uniform(*FROZEN_S))
            os.kill(pid, signal.SIGCONT)
        else:
            await trio.to_thread.run_sync(node.kill if kind == "kill" else node.terminate)
            await trio.sleep(self._rng.uniform(*DOWN_S))
            await trio.to_thread.run_sync(node.kill)  # If it has not stopped in order by now.
            node.start([other.address for other in self._nodes if other is not node and other.up])
        self._away.discard(node.name)


async def soak(seconds: float, seed: int, folder: Path) -> list[Figure]:
    """A swarm in ``folder`` for so long."""
    spec_file = folder / "run.toml"
    phases = ", ".join(f"{{ until = {share / 8}, merges = 8000 }}" for share in range(1, 9))
    spec_file.write_text(SPEC.format(phases=phases))
    *ports, first, second = free_ports(NODES + OBSERVERS)
    nodes = [
        NodeProcess(
            folder, f"n{number}", port=port, part=f"{number}/{NODES}", spec_file=spec_file, alone=False
        )
        for number, port in enumerate(ports, start=1)
    ]
    for node, port in zip(nodes, (first, second), strict=False):
        node.home.create()
        node.home.config_file.write_text(f'metrics_listen = "127.0.0.1:{port}"\n')
    watch, trouble = Watch(folder / "soak.jsonl"), Trouble(nodes, random.Random(seed))
    try:
        for node in nodes:
            node.start([nodes[0].address] if node is not nodes[0] else [])
        with trio.fail_after(START_S_MAX):
            while any(node.state == "starting" for node in nodes):
                for node in nodes:
                    await node.look()
                await trio.sleep(1.0)
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trouble.run)
            told_s = 0.0
            while (now_s := trio.current_time() - began_s) < seconds:
                await watch.look(nodes, (first, second), began_s)
                if now_s >= told_s:
                    up = sum(node.up for node in nodes)
                    print(
                        f"{now_s / 60:5.1f} min: {len(watch.hashes)} merges, {trouble.count} troubles, {up} up,"
                        f" longest gap {watch.gap_s(now_s):.0f} s, unequal {watch.unequal}",
                        flush=True,
                    )
                    told_s += 60.0
                await trio.sleep(LOOK_S)
            nursery.cancel_scope.cancel()
        return [Figure("troubles", "", (float(trouble.count),)), *watch.figures(seconds)]
    finally:
        for node in nodes:
            pid = node.row().pid
            if pid is not None:
                os.kill(pid, signal.SIGCONT)
            node.kill()


def main() -> int:
    """Run, print the figures, and say whether all bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where homes, logs and soak.jsonl are kept")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="gossamer-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"in {folder}", flush=True)
    figures = trio.run(soak, 60 * arguments.minutes, arguments.seed, folder)
    for figure in figures:
        print(figure.line())
    return 0 if all(figure.met is not False for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
