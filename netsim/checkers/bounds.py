"""What must stay small, and what must be gone: tables, streams, tasks and pins of a process, and all of it afterwards.

Owns the checkers ``bounded`` (S6) and ``leaks``, and ``task_census`` for whoever runs a whole world.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from gossip.ledger import PEERS_MAX
from gossip.messages import NOTICE_BODIES
from gossip.store import FOLDER
from netsim.checkers.base import Machine, Report, Watcher, World, tasks_under
from node.gossip_node import GossipNode
from node.merge_host import ACCEPTED_KEPT, MERGES_KEPT
from p2p.transport import Transport

TASKS_BASE, TASKS_PER_PEER, TASKS_PER_MEMBER = 60, 20, 2
"""Tasks of a process: its own, those that serve and ask each connected peer, those that a merge has for each member."""
STREAMS_BASE, STREAMS_PER_PEER = 16, 12
"""Streams that a process and its peers keep open at one moment, in both directions."""
CONTRIBUTIONS_MAX = 4
"""Links whose inputs a node keeps at once: the present one, and those of branches it has just left."""
RECORDS_OVER = 2
"""Records held beyond ``merge_records_kept`` while a branch is taken over."""
ENDED_S = 5.0
"""A process that was ended is gone within this time."""


class Bounded(Watcher):
    """S6: whatever peers send and however long it goes on, nothing a process holds grows past its bound."""

    name = "bounded"
    every_s = 10.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._roots: dict[int, trio.lowlevel.Task] = {}

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See which task lives this life."""
        self._roots.pop(machine.number, None)

        def begun() -> None:
            self._roots[machine.number] = trio.lowlevel.current_task()

        self.watch(node, "run", begun)

    def look(self, now_s: float) -> None:
        """Measure every process."""
        for machine, node in self.running():
            for what, count, most in self._measures(machine, node):
                if count > most:
                    self.fail(f"{what}: more than {most}", machine.number)

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """What a process has left on the disk fits its quota too."""
        self._check_store(machine, node)

    def finished(self, now_s: float) -> None:
        """The same of all that still run."""
        self.look(now_s)
        for machine, node in self.running():
            self._check_store(machine, node)

    def _check_store(self, machine: Machine, node: GossipNode) -> None:
        stored = sum(map(len, machine.disk.files_in(FOLDER).values()))
        if stored > node.store._quota_bytes:
            self.fail(f"bytes in {FOLDER}/: more than {node.store._quota_bytes}", machine.number)

    def _measures(self, machine: Machine, node: GossipNode) -> Iterator[tuple[str, int, int]]:
        """(what, how much, at most)."""
        limits, transport, merger = node.limits, node.runtime.transport, node.merger
        peers = len(transport.peers())
        yield "connections", peers, limits.peers_max
        yield "streams", transport.traffic().streams_open, STREAMS_BASE + STREAMS_PER_PEER * peers
        if (root := self._roots.get(machine.number)) is not None:
            members = len(node.members._entries)
            tasks_max = TASKS_BASE + TASKS_PER_PEER * peers + TASKS_PER_MEMBER * members
            yield "tasks", len(tasks_under(root)), tasks_max
        yield "notices", len(node.notices._registers), limits.members_max * len(NOTICE_BODIES)
        yield "members", len(node.members._entries), limits.members_max
        yield "address book", len(node.book), limits.address_book_max
        yield "ledger accounts", len(node.ledger._accounts), PEERS_MAX
        yield "peers reconciled with", len(node.anti_entropy._meeting), limits.peers_max
        yield "holders credited", len(node.fetcher.bytes_pulled), limits.address_book_max
        yield "bytes stored", node.store._bytes_held, node.store._quota_bytes
        yield "contributions remembered", len(node.merge_host._pledges), CONTRIBUTIONS_MAX
        yield "contributions offered", len(merger._member._contributions), CONTRIBUTIONS_MAX
        yield "records", len(merger._chain._records), limits.merge_records_kept + RECORDS_OVER
        yield "hints at heads", len(merger._catch_up._hints), limits.members_max
        pins = Counter(pin.partition("/")[0] for pin in self._pins(node))
        yield "links with inputs pinned", pins["merge-inputs"], CONTRIBUTIONS_MAX
        yield "anchors pinned", pins["anchor"], MERGES_KEPT + 1
        yield "accepted records pinned", pins["accepted"], ACCEPTED_KEPT + 1
        snapshots = node.snapshots._kept_max * node.trainer.layout.fragments
        yield "snapshots pinned", pins["snapshot"], snapshots + 1
        yield "snapshots kept", sum(map(len, node.snapshots._kept.values())), snapshots + 1

    def _pins(self, node: GossipNode) -> set[str]:
        return {owner for held in node.store._held.values() for owner in held.owners}


@dataclass(slots=True, eq=False)
class _Life:
    """A process: whether it runs, and since when it should not any more."""

    machine: int
    transport: Transport
    running: bool = False
    ended_s: float = math.inf


class Leaks(Watcher):
    """Once a process has ended, however it did, none of its tasks lives on and none of its streams stays open."""

    name = "leaks"
    every_s = 5.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._lives: dict[int, _Life] = {}
        self._ended: list[_Life] = []

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See whether a life goes on."""
        life = self._lives[machine.number] = _Life(machine.number, node.runtime.transport)

        def over(_: object) -> None:
            life.running = False

        def begun() -> Callable[[object], None]:
            life.running = True
            return over

        self.watch(node, "run", begun, raised=over)

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """It is looked for a little later: what is cancelled still has to come to its end."""
        life = self._lives.pop(machine.number)
        life.ended_s = trio.current_time()
        self._ended.append(life)

    def look(self, now_s: float) -> None:
        """Look for what should be gone."""
        due = [life for life in self._ended if now_s - life.ended_s >= ENDED_S]
        self._ended = [life for life in self._ended if now_s - life.ended_s < ENDED_S]
        for life in due:
            if life.running:
                self.fail("a process that was ended still runs", life.machine)
            if streams := life.transport.traffic().streams_open:
                self.fail(f"{streams} streams outlive their process", life.machine)


@contextlib.contextmanager
def task_census(report: Report) -> Iterator[None]:
    """Report as ``leaks`` when more tasks are alive after the block than before: a world that was left must be gone."""
    before = trio.lowlevel.current_statistics().tasks_living
    yield
    after = trio.lowlevel.current_statistics().tasks_living
    if after > before:
        report(Leaks.name, f"{after - before} tasks outlive the world", None)
