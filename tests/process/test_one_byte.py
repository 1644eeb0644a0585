"""One-byte mode among real processes: whatever happens on the way, who holds the same records holds the same model."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from cli.node_process import NodeProcess, free_ports
from node.control import Export
from node.status import NodeStatus
from tests.process.cables import Cables, open_cables
from tests.process.swarm import until

STEPS = 1500
SPEC = f"""
name = "one-byte-test"
init = "shared"
[model]
layers = 2
width = 64
heads = 4
context = 64
[data]
held_out_bytes = 16384
[train]
steps = {STEPS}
batch = 4
[one_byte]
batch_records = 8
"""

CUT_S = 20.0
"""Long enough that both sides give each other up."""
AGREED_S_MAX = 10.0
"""After the last record was made."""


def alike(statuses: Sequence[NodeStatus]) -> bool:
    """Whether all report one state hash of the same records, with nothing under way."""
    reports = [status.records for status in statuses]
    return len({(report.vector, report.state) for report in reports}) == 1 and reports[0].state is not None


def met_and_applied(records: int) -> Callable[[list[NodeStatus]], bool]:
    """Whether everybody knows everybody and holds so many records: on a busy machine the second can come first."""
    return lambda statuses: all(
        len(status.peers) == len(statuses) - 1 and status.records.applied >= records for status in statuses
    )


def all_learned(statuses: Sequence[NodeStatus]) -> bool:
    return all(status.step == status.steps_total and status.records.unsent == 0 for status in statuses)


class Swarm:
    """Nodes that reach each other through ``cables`` only."""

    def __init__(self, folder: Path, cables: Cables) -> None:
        self._folder = folder
        self._cables = cables
        self._ports = free_ports(5)
        self._spec_file = folder / "run.toml"
        self._spec_file.write_text(SPEC)
        self.nodes: list[NodeProcess] = []

    async def add(self) -> NodeProcess:
        """Start one more; it knows the first one's address."""
        port = self._ports[len(self.nodes)]
        number = len(self.nodes) + 1
        node = NodeProcess(
            self._folder, f"n{number}", port=port, part=f"{number}/5", spec_file=self._spec_file, alone=False
        )
        await self._cables.plug_in(node, port)
        self.nodes.append(node)
        self.start(node)
        return node

    def start(self, node: NodeProcess) -> None:
        first = self.nodes[0]
        node.start([self._cables.address(first)] if node is not first else [])


@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("returns", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_one_killed_one_cut_off_and_one_late_end_with_equal_files(
    tmp_path: Path, returns: bool
) -> None:
    async with open_cables() as cables:
        swarm = Swarm(tmp_path, cables)
        try:
            for _ in range(4):
                await swarm.add()
            first, _, killed, away = swarm.nodes
            met = await until(swarm.nodes, met_and_applied(400), seconds=90)

            killed.kill()
            cables.cut(away)
            there = [node for node in swarm.nodes if node not in (killed, away)]
            cut_s = trio.current_time()
            late = await swarm.add()
            there.append(late)
            began = await until(there, lambda s: s[-1].records is not None and s[-1].step > 0, seconds=60)
            # It does not begin at nothing, and those who are there go on without those who are not.
            assert began[-1].records.applied > 400
            await trio.sleep(max(0.0, cut_s + CUT_S - trio.current_time()))
            (alone,) = await until([away], lambda s: not any(p.connected for p in s[0].peers), seconds=10)
            apart = await until(there, lambda s: True, seconds=10)
            assert alone.records.vector not in {status.records.vector for status in apart}
            assert alone.step > met[3].step, "who is cut off goes on by itself"
            cables.mend(away)
            if returns:
                swarm.start(killed)
            live = [node for node in swarm.nodes if node.up]
            assert len(live) == (5 if returns else 4)

            await until(live, all_learned, seconds=150)
            learned_s = trio.current_time()
            last = await until(live, alike, seconds=AGREED_S_MAX)
            print(f"equal {trio.current_time() - learned_s:.1f} s after the last record")
            assert last[0].records.applied >= len(live) * STEPS
            assert not any(status.refusals for status in last)

            files = [tmp_path / f"{node.name}.safetensors" for node in live]
            for node, file in zip(live, files, strict=True):
                await node.ask("export", Export(path=str(file)))
            assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1
            # Two counts of the same bytes: the daemon's own, and the forwarder's.
            told = last[0].bytes_received
            assert cables.carried_bytes[first.name] == pytest.approx(told, rel=0.02)
        finally:
            for node in swarm.nodes:
                node.kill()
