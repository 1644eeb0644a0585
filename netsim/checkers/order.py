"""What only ever goes forward: counters of a life, the chain, and a member's word across kills and power cuts.

Owns the checkers ``monotonic`` and ``agreement``.
"""

from __future__ import annotations

from collections import OrderedDict

from gossip.merge_acceptor import AcceptorState
from gossip.merge_chain import MergeChain
from gossip.merge_member import PROMISE
from gossip.merge_record import Link, electorate
from gossip.messages import Ballot, Heartbeat, MergeRecord, Message, Notice
from gossip.store import FOLDER
from netsim.checkers.base import Machine, Report, Watcher, World, short
from node.gossip_node import GossipNode
from node.life import PATH as NODE_STATE
from p2p.transport import PeerId

LINKS_KEPT = 32
"""Links on which each member's word is remembered, and links of which the committed records are."""


class Monotonic(Watcher):
    """Incarnations, versions of notices, steps, passed merge points, the head's branch: none ever goes back.

    An incarnation and the head also survive every kind of stop, unless the disk was damaged.
    """

    name = "monotonic"
    every_s = 2.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._incarnations: dict[int, int] = {}
        self._participants: dict[int, int] = {}
        self._in_life: dict[int, tuple[int, int, int]] = {}
        self._said: dict[int, tuple[int, ...]] = {}

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """A new life: its incarnation, what it says, what it hears and what it has kept of the chain."""
        number = machine.number
        self._in_life.pop(number, None)
        self._said.pop(number, None)
        incarnation = node.notices.incarnation
        if incarnation <= self._incarnations.get(number, -1) and NODE_STATE not in machine.disk.damaged:
            self.fail(f"incarnation {incarnation} after {self._incarnations[number]}", number)
        if machine.disk.is_unsynced(NODE_STATE):
            self.fail(f"incarnation {incarnation} begun before it was on disk", number)
        self._incarnations[number] = incarnation

        table = node.notices

        held: dict[str, dict[PeerId, tuple[int, int]]] = {}

        def heed(author: PeerId, kind: str, body: Message | None) -> None:
            versions, notice = held.setdefault(kind, {}), table.get(author, kind)
            if notice is None:
                del versions[author]
                return
            version = version_of(notice)
            if version < versions.get(author, version):
                self.fail(f"took an older notice of {author} for news", number)
            versions[author] = version

        def publish(kind: str, body: Message) -> None:
            if isinstance(body, Heartbeat):
                self._check_heartbeat(number, body, resting=bool(node.ledger.resting))

        table.on_change(heed)
        self.watch(table, "publish", publish)
        self.after(node.merger, "load", lambda _: self._check_chain(machine, node))

    def look(self, now_s: float) -> None:
        """The counters of every life."""
        for machine, node in self.running():
            self._check_life(machine, node)

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """What the next life must not fall short of."""
        self._check_life(machine, node)

    def _check_life(self, machine: Machine, node: GossipNode) -> None:
        number = machine.number
        now = node.trainer.step, node.rounds.points_passed, node.merger.head_participants
        before = self._in_life.get(number, now)
        for what, value, earlier in zip(("step", "merge points", "participants"), now, before, strict=True):
            if value < earlier:
                self.fail(f"{what} fell from {earlier} to {value}", number)
        self._in_life[number] = now
        self._participants[number] = max(self._participants.get(number, 0), now[2])
        self._incarnations[number] = max(self._incarnations[number], node.notices.incarnation)

    def _check_heartbeat(self, number: int, beat: Heartbeat, *, resting: bool) -> None:
        # Who only rests takes its goodbye back.
        now = beat.step, beat.tokens, beat.head_participants, int(beat.leaving and not resting)
        before = self._said.get(number, now)
        if any(value < earlier for value, earlier in zip(now, before, strict=True)):
            self.fail(f"published {now} (step, tokens, participants, leaving) after {before}", number)
        self._said[number] = now

    def _check_chain(self, machine: Machine, node: GossipNode) -> None:
        held, before = node.merger.head_participants, self._participants.get(machine.number, 0)
        if held < before and not damaged_under(machine, "merges/"):
            self.fail(f"came back with {held} participants in its chain, had {before}", machine.number)


class Agreement(Watcher):
    """At most one record is committed on a link, and no member goes back on its word, whatever happens to it.

    Two records of one link are allowed only where the quorums of their electorates need not meet, after a partition
    so long that each side counts the other as absent, or at genesis; or where fewer than a quorum of the earlier one's
    electorate have a voice in the later: those had given the earlier one up as undecidable. A promise or acceptance is
    on disk before it is said, with all results of what is accepted, and counts in every later life (Lamport, "Paxos
    Made Simple", 2001, section 2.2).
    """

    name = "agreement"

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._committed: OrderedDict[bytes, dict[bytes, tuple[Ballot, frozenset[str]]]] = OrderedDict()
        """Parent -> record hash -> the ballot the record was made for, and its electorate."""
        self._words: OrderedDict[tuple[int, bytes], AcceptorState] = OrderedDict()
        """(machine, parent) -> what was promised and accepted last."""

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """See every record that is held as committed, and every word this member gives."""
        chain = node.merger._chain

        self.after(chain, "_follow", lambda _, name: self._check_committed(chain, name))
        self.after(
            node.merger._member,
            "_write",
            lambda _, link, state: self._check_word(machine, link.parent, state),
        )

    def _check_committed(self, chain: MergeChain, name: bytes) -> None:
        committed = chain.get(name)
        if committed is None or name in self._committed.get(committed.record.parent, {}):
            return
        record = committed.record
        link = Link.genesis(record.run) if record.height == 1 else chain.link_after(record.parent)
        if link is None:
            return  # What a newcomer takes at its word: whoever was there has shown it to us before.
        members: frozenset[str] = electorate(record, link)
        known = self._committed.setdefault(record.parent, {})
        for other, (ballot, theirs) in known.items():
            earlier, later = (theirs, members) if ballot < record.ballot else (members, theirs)
            must_meet = majority_of(members) + majority_of(theirs) > len(members | theirs)
            if must_meet and len(earlier & later) >= majority_of(earlier):
                self.fail(
                    f"records {short(other)} and {short(name)} are both committed on link {short(record.parent)},"
                    f" by {len(theirs)} and {len(members)} members of {len(members | theirs)}"
                )
        known[name] = record.ballot, members
        while len(self._committed) > LINKS_KEPT:
            self._committed.popitem(last=False)

    def _check_word(self, machine: Machine, parent: bytes, state: AcceptorState) -> None:
        before = self._words.pop((machine.number, parent), AcceptorState(parent=parent))
        where = f"on link {short(parent)}"
        if ballot_of(state.promised) < ballot_of(before.promised):
            self.fail(
                f"answered ballot {words(state.promised)} {where} after {words(before.promised)}",
                machine.number,
            )
        if before.accepted is not None and (
            state.accepted is None or state.accepted.ballot < before.accepted.ballot
        ):
            self.fail(
                f"forgot {where} what it accepted under {words(before.accepted.ballot)}", machine.number
            )
        if PROMISE not in machine.disk.damaged and machine.disk.is_unsynced(PROMISE):
            self.fail(f"gave its word {where} before it was on disk", machine.number)
        if state.accepted is not None and state.accepted != before.accepted:
            self._check_results(machine, state.accepted.record)
        self._words[machine.number, parent] = state
        while len(self._words) > LINKS_KEPT * len(self.world.machines):
            self._words.popitem(last=False)

    def _check_results(self, machine: Machine, record: MergeRecord) -> None:
        """Whoever accepts a record may be the only one to bring its results to those who decide."""
        disk = machine.disk
        held = disk.files_in(FOLDER)
        for ref in record.results:
            path = f"{FOLDER}/{ref.root.hex()}-{ref.size}"
            if path not in disk.damaged and (path not in held or disk.is_unsynced(path)):
                self.fail(f"accepted a record before {path} was on disk", machine.number)


def majority_of(members: frozenset[str]) -> int:
    """The smallest number that is more than half of ``members``."""
    return len(members) // 2 + 1


def ballot_of(ballot: Ballot | None) -> tuple[int, str]:
    """What orders ballots; no ballot at all comes first."""
    return (-1, "") if ballot is None else (ballot.attempt, ballot.proposer)


def words(ballot: Ballot | None) -> str:
    """A ballot, for people."""
    return "none" if ballot is None else f"{ballot.attempt} of {ballot.proposer[-8:]}"


def version_of(notice: Notice) -> tuple[int, int]:
    """What orders the notices of one author on one kind."""
    return notice.incarnation, notice.sequence


def damaged_under(machine: Machine, folder: str) -> bool:
    """Whether a fault of the disk has hit a file whose path begins with ``folder``."""
    return any(path.startswith(folder) for path in machine.disk.damaged)
