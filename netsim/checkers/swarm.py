"""What the swarm as a whole must do once nothing goes wrong any more: see itself, merge, and agree.

Owns the checkers ``membership``, ``progress`` and ``agreement-at-the-end`` (L1).
"""

from __future__ import annotations

import math

from gossip.members import SUSPECT_S_MAX, heartbeat_interval_s
from gossip.merge_record import quorum
from netsim.checkers.anchors import hash_of
from netsim.checkers.base import Machine, Report, Watcher, World, is_calm, short
from node.gossip_node import GossipNode
from p2p.transport import PeerId

SETTLED_S = 60.0
"""A swarm has had time to find itself when it was calm for this long; a node, when it has run for this long."""
UNSEEN_S = 30.0
"""A member may be missed for this long: one that is slow or far away is now and then late."""
BEATS = 2.0
"""Of both, as many intervals between heartbeats more: in a large swarm everything takes longer."""
OFF_S = SUSPECT_S_MAX + 30.0
"""Nobody takes a member for alive that has been off for this long."""
OBSERVERS_MAX = 16
"""Nodes whose view is looked at; of a larger swarm others come next."""
HEALED_S = 30.0
"""Connections across what was cut, and trust in whoever was silent, are back by now."""
COMMIT_S = 120.0
"""A merge that is wanted is committed within this time: calls, sums and a few attempts at them."""
MERGES_TO_AGREE = 3


class Membership(Watcher):
    """In a swarm that has been calm for a while everybody sees whoever runs, and nobody that has long been off."""

    name = "membership"
    every_s = 5.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._up_since_s: dict[int, float] = {}
        self._off_since_s: dict[int, float] = {}
        self._unseen_since_s: dict[tuple[int, int], float] = {}
        self._first = 0

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """A machine is on."""
        self._up_since_s[machine.number] = node.began_s
        self._off_since_s.pop(machine.number, None)

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """A machine is off."""
        self._up_since_s.pop(machine.number, None)
        self._off_since_s[machine.number] = math.inf

    def look(self, now_s: float) -> None:
        """Compare what nodes see with what is there."""
        for number, since_s in self._off_since_s.items():
            self._off_since_s[number] = min(since_s, now_s)
        slack_s = BEATS * heartbeat_interval_s(len(self.world.machines))
        if not is_calm(self.world, now_s, SETTLED_S + slack_s):
            self._unseen_since_s.clear()
            return
        settled = [
            (machine, node)
            for machine, node in self.running()
            if now_s - self._up_since_s[machine.number] >= SETTLED_S + slack_s
        ]
        off = {
            self.world.machines[number].identity.peer: number
            for number, since_s in self._off_since_s.items()
            if now_s - since_s >= OFF_S
        }
        for machine, node in self._observers(settled, round_number=int(now_s / (2 * (UNSEEN_S + slack_s)))):
            seen = {*node.members.alive(now_s), machine.identity.peer}
            for other, _ in settled:
                if other.identity.peer in seen:
                    self._unseen_since_s.pop((machine.number, other.number), None)
                else:
                    since_s = self._unseen_since_s.setdefault((machine.number, other.number), now_s)
                    if now_s - since_s >= UNSEEN_S + slack_s:
                        self.fail(f"does not see machine {other.number}", machine.number)
            for peer in sorted(seen & off.keys()):
                self.fail(
                    f"takes machine {off[peer]} for alive, long after it was switched off", machine.number
                )

    def _observers(
        self, settled: list[tuple[Machine, GossipNode]], *, round_number: int
    ) -> list[tuple[Machine, GossipNode]]:
        """Whose view is looked at; the same ones for as long as a round takes."""
        if len(settled) <= OBSERVERS_MAX:
            return settled
        first = round_number * OBSERVERS_MAX % len(settled)
        if first != self._first:
            self._first = first
            self._unseen_since_s.clear()
        return (settled + settled)[first : first + OBSERVERS_MAX]


class Progress(Watcher):
    """A merge that is wanted is committed soon, while nothing goes wrong and a quorum is there."""

    name = "progress"
    every_s = 5.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._height = -1
        self._waiting_since_s: float | None = None

    def look(self, now_s: float) -> None:
        """Measure how long the swarm has been waiting for a commit it could have."""
        nodes = [node for _, node in self.running()]
        height = max((node.merger.head_height for node in nodes), default=-1)
        able = is_calm(self.world, now_s, HEALED_S) and wants_merge(nodes) and has_quorum(nodes)
        if height > self._height or not able:
            self._height, self._waiting_since_s = max(height, self._height), None
        elif self._waiting_since_s is None:
            self._waiting_since_s = now_s
        elif now_s - self._waiting_since_s > COMMIT_S:
            problems = sorted({node.merger.problem for node in nodes} - {""})
            self.fail(f"no merge after height {height} for {COMMIT_S:g} s: {'; '.join(problems)}")


class AgreementAtTheEnd(Watcher):
    """L1: in the liveness phase all of the core hold one head and one anchor, within 3 merges and before it ends."""

    name = "agreement-at-the-end"

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._first_height: int | None = None
        self._agreed = False

    def look(self, now_s: float) -> None:
        """Look whether the core agrees by now."""
        core = self._core()
        if not core or self._agreed:
            return
        heights = [node.merger.head_height for _, node in core]
        if self._first_height is None:
            self._first_height = max(heights)
        complete = all(
            self.world.machines[number].node is not None
            for number in self.world.core
            if self.world.machines[number].honest
        )
        self._agreed = complete and len({held(node) for _, node in core}) == 1
        if not self._agreed and max(heights) > self._first_height + MERGES_TO_AGREE:
            self.fail(f"the core does not agree after {MERGES_TO_AGREE} merges: {self._views(core)}")

    def finished(self, now_s: float) -> None:
        """By now it must have."""
        self.look(now_s)
        if self.world.core and not self._agreed:
            self.fail(f"the core never agreed: {self._views(self._core())}")

    def _core(self) -> list[tuple[Machine, GossipNode]]:
        return [(machine, node) for machine, node in self.running() if machine.number in self.world.core]

    def _views(self, core: list[tuple[Machine, GossipNode]]) -> str:
        heads = (
            f"{machine.number} {node.merger.head_height}:{short(node.merger.head)}" for machine, node in core
        )
        return ", ".join(heads) or "none of it runs"


def held(node: GossipNode) -> tuple[bytes, bytes]:
    """The head of a node's chain and the hash of its anchor, empty before the first."""
    anchor = node.merge_host.anchor
    return node.merger.head, b"" if anchor is None else hash_of(anchor)


def wants_merge(nodes: list[GossipNode]) -> bool:
    """Whether any of them waits for a merge."""
    return any(node.merger._turns._wanted_s < math.inf for node in nodes)


def has_quorum(nodes: list[GossipNode]) -> bool:
    """Whether most members with a voice in the next link, as the best head says, are among them."""
    running = {node.local for node in nodes}
    best = max(nodes, key=lambda node: (node.merger.head_participants, node.merger.head))
    voices: frozenset[PeerId] = best.merger._chain.link.voters(absent=())
    return not voices or len(voices & running) >= quorum(voices)
