"""Votes and certificates: what a node relies on, what it takes over, and whom it believes.

A small world around one node: real notices, keys and shards; a network that is a dictionary; and a keeper whose states
are what the test says they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import trio

from gossip.ledger import PeerLedger
from gossip.messages import (
    Certificate,
    RecordSnapshot,
    SettledLog,
    Settlement,
    ShardRef,
    SnapshotVote,
)
from gossip.notices import NoticeTable
from gossip.shard_transfer import FetchFailed
from gossip.snapshot_votes import CANDIDATES_MAX, OUTVOTED_S
from gossip.store import ShardStore, outline_of
from node.record_snapshots import PATIENCE_S, TURN_S, Certified, RecordSnapshots
from p2p.codec import encode
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS
from p2p.transport import PeerId
from tests.gossip.world import IDENTITIES, OTHER_RUN, RUN, MemoryDisk

EVERY = 100
SELF, *OTHERS = IDENTITIES
A, B, C, STRANGER, ACCOMPLICE = OTHERS


@dataclass
class FakeKeeper:
    """Holds ``held`` records of one ``side`` of a fork; what it holds comes to its true state."""

    held: int = 250
    side: bytes = b"true"
    settled: list[int] = field(default_factory=list)
    began_from: list[bytes] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    @property
    def records(self) -> int:
        return self.held

    def settlement(self) -> Settlement:
        return settlement_of(self.held, self.side)

    def _holds(self, settlement: Settlement) -> bool:
        return all(entry.end <= self.held and entry.name[:4] == self.side for entry in settlement.logs)

    async def state_of(self, settlement: Settlement) -> bytes | None:
        records = sum(entry.end for entry in settlement.logs)
        return true_state(records) if self._holds(settlement) else None

    async def settle(self, settlement: Settlement) -> bool:
        if not self._holds(settlement):
            return False
        self.settled.append(sum(entry.end for entry in settlement.logs))
        return True

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        if len(state) % 4:
            raise ValueError(f"{len(state)} bytes are not a state of this model")
        self.began_from.append(state)
        self.held = sum(entry.end for entry in settlement.logs)
        self.side = settlement.logs[0].name[:4]

    async def forget(self, certified: Certified) -> bool:
        self.forgotten.append(certified.snapshot.records)
        return True


class FakeFetcher:
    """Everybody serves everything, but what was made to fail."""

    def __init__(self) -> None:
        self.shards: dict[ShardRef, bytes] = {}

    async def fetch(self, ref: ShardRef, holders: Sequence[PeerId], *, timeout_s: float) -> bytes:
        await trio.lowlevel.checkpoint()
        if ref not in self.shards or not holders:
            raise FetchFailed("nobody is known to hold it")
        return self.shards[ref]

    async def offer(self, data: bytes) -> ShardRef:
        ref, _ = await outline_of(data)
        self.shards[ref] = data
        return ref


def true_state(records: int) -> bytes:
    return records.to_bytes(8, "little")


def settlement_of(records: int, side: bytes = b"true") -> Settlement:
    entry = SettledLog(author=A.peer, incarnation=7, number=1, end=records, clock=records, name=side * 8)
    return Settlement(logs=[entry])


class Seen:
    """One node, and what others say to it."""

    def __init__(self, *, votes_needed: int = 2) -> None:
        self.notices = NoticeTable(signer=SELF, run=RUN, incarnation=1, limits=DEFAULT_LIMITS)
        self.ledger = PeerLedger()
        self.fetcher = FakeFetcher()
        self.store = ShardStore(MemoryDisk(), quota_bytes=1 << 24)
        self.keeper = FakeKeeper()
        self.holding = {one.peer for one in (SELF, A, B, C)}
        """Members with records."""
        self.alive = [one.peer for one in (SELF, A, B, C)]
        self.snapshots = RecordSnapshots(
            local=SELF.peer,
            notices=self.notices,
            store=self.store,
            fetcher=self.fetcher,  # type: ignore[arg-type]
            ledger=self.ledger,
            keeper=self.keeper,
            alive=lambda: self.alive,
            learned=lambda: [peer for peer in self.alive if peer in self.holding],
            every_records=EVERY,
            votes_needed=votes_needed,
        )
        self._said = 0

    async def snapshot(
        self, records: int, state: bytes | None = None, side: bytes = b"true"
    ) -> RecordSnapshot:
        """One that can be fetched, true unless a ``state`` is given."""
        return RecordSnapshot(
            records=records,
            settlement=await self.fetcher.offer(encode(settlement_of(records, side))),
            state=await self.fetcher.offer(true_state(records) if state is None else state),
        )

    def vote(
        self,
        voter: Identity,
        snapshot: RecordSnapshot,
        certificate: ShardRef | None = None,
        run: bytes = RUN,
    ) -> bytes:
        """The notice of a vote, as it travels."""
        self._said += 1
        table = NoticeTable(signer=voter, run=run, incarnation=self._said, limits=DEFAULT_LIMITS)
        return encode(table.publish("snapshot", SnapshotVote(snapshot=snapshot, certificate=certificate)))

    def hear(self, packed: bytes) -> None:
        self.notices.offer(packed, trio.current_time())

    async def certificate(self, votes: list[bytes]) -> ShardRef:
        return await self.fetcher.offer(encode(Certificate(votes=votes)))

    async def look_for(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            await self.snapshots.look()
            await trio.sleep(1)

    @property
    def relied_on(self) -> int:
        """Records of the snapshot that the node relies on."""
        return self.snapshots.certified.snapshot.records if self.snapshots.certified else 0

    @property
    def untouched(self) -> bool:
        """Whether nothing of what the node holds was changed."""
        return not self.keeper.settled and not self.keeper.began_from and self.keeper.held == 250


async def test_enough_votes_of_members_for_what_comes_out_here_certify(autojump_clock: object) -> None:
    node = Seen()
    true = await node.snapshot(200)
    node.hear(node.vote(A, true))
    await node.look_for(2)
    assert node.snapshots.certified is not None, "our own vote is the second"
    assert node.keeper.settled == [200]
    assert not node.keeper.began_from
    assert len(node.snapshots.certified.certificate.votes) == 2


async def test_who_relies_on_a_snapshot_holds_it(autojump_clock: object) -> None:
    """Although it did not vote: newcomers ask it, and its own next life begins from there."""
    node = Seen()
    true = await node.snapshot(200)
    for one in (A, B):
        node.hear(node.vote(one, true))
    del node.fetcher.shards[true.state]
    await node.look_for(1)
    assert node.relied_on == 200
    assert await node.store.get(true.state) == true_state(200)
    assert node.store.statistics().bytes_pinned >= 8 + len(await node.store.get(true.settlement))


async def test_one_vote_is_too_few_whoever_repeats_it(autojump_clock: object) -> None:
    node = Seen(votes_needed=3)
    true = await node.snapshot(200)
    node.hear(node.vote(A, true))
    node.hear(node.vote(A, true))
    twice = [node.vote(A, true) for _ in range(3)]
    node.hear(node.vote(A, true, await node.certificate(twice)))
    await node.look_for(5)
    assert node.relied_on == 0
    assert node.ledger.refusals["false-snapshot"] == 1
    assert node.ledger.standing(A.peer) < 100
    node.hear(node.vote(B, true))
    await node.look_for(2)
    assert node.relied_on == 200


@pytest.mark.parametrize("records", [200, 5000])
async def test_the_votes_of_strangers_certify_nothing(autojump_clock: object, records: int) -> None:
    """Any number of keys costs nothing. Neither what is held nor the weights are theirs to replace."""
    node = Seen()
    false = await node.snapshot(records, b"evil" * 2)
    votes = [node.vote(one, false) for one in (STRANGER, ACCOMPLICE)]
    ref = await node.certificate(votes)
    for one in (STRANGER, ACCOMPLICE):
        node.hear(node.vote(one, false, ref))
    node.alive = sorted({*node.alive, STRANGER.peer, ACCOMPLICE.peer})
    await node.look_for(3 * PATIENCE_S)
    assert node.untouched
    assert node.snapshots.certified is None or node.snapshots.certified.snapshot != false
    assert node.ledger.refusals["unvouched"] >= 1
    problems = [node.ledger.last_problem(one.peer) for one in (STRANGER, ACCOMPLICE)]
    assert any(problem.startswith("unvouched") for problem in problems)


async def test_a_minority_of_members_takes_nobody_over(autojump_clock: object) -> None:
    """Two members of nine invent records that nobody can have, and vote for what they come to."""
    node = Seen()
    crowd = [PeerId(f"12D3KooW{letter * 44}") for letter in "DEFGH"]
    node.holding |= set(crowd)
    node.alive = sorted({*node.alive, *crowd})
    false = await node.snapshot(10**6, b"evil" * 2)
    for one in (A, B):
        node.hear(node.vote(one, false))
    await node.look_for(3 * PATIENCE_S)
    assert node.untouched
    assert node.relied_on != 10**6
    node.hear(node.vote(C, false))
    await node.look_for(3 * PATIENCE_S)
    assert node.keeper.began_from == [b"evil" * 2], "a third of those alive: they may know better"


@pytest.mark.parametrize("known", [[A], []])
async def test_who_met_few_before_it_was_cut_off_goes_over_to_the_many(
    autojump_clock: object, known: list[Identity]
) -> None:
    """It has records of its own, and the batches of the others are let go of: nobody can show it any more."""
    node = Seen(votes_needed=3)
    node.holding = {one.peer for one in (SELF, *known)}
    later = await node.snapshot(900)
    for one in (A, B, C):
        node.hear(node.vote(one, later))
    await node.look_for(2 * PATIENCE_S)
    assert node.relied_on == 900


async def test_a_part_of_less_than_a_third_goes_over_to_the_rest_although_it_has_more(
    autojump_clock: object,
) -> None:
    """It made more records while it was cut off, and the rest would never take those over."""
    node = Seen()
    ours = await node.snapshot(200)
    node.hear(node.vote(A, ours))
    node.alive = sorted([SELF.peer, A.peer])
    await node.look_for(2)
    assert node.relied_on == 200
    node.alive = sorted(one.peer for one in IDENTITIES[:6])
    node.holding |= set(node.alive)
    theirs = await node.snapshot(100, side=b"rite")
    votes = [node.vote(one, theirs) for one in (B, C)]
    ref = await node.certificate(votes)
    for one in (B, C, STRANGER, ACCOMPLICE):
        node.hear(node.vote(one, theirs, ref))
    await node.look_for(4 * PATIENCE_S)
    assert node.relied_on == 200, "four of six are not more than two thirds"
    node.holding.discard(A.peer)
    await node.look_for(OUTVOTED_S - 5)
    assert node.relied_on == 200, "they may be a little behind"
    await node.look_for(5 + 2 * PATIENCE_S)
    assert node.relied_on == 100


async def test_what_does_not_come_out_here_is_refused_whoever_voted(autojump_clock: object) -> None:
    node = Seen()
    false = await node.snapshot(200, b"evil" * 2)
    for one in (A, B, C):
        node.hear(node.vote(one, false))
    await node.look_for(PATIENCE_S)
    assert node.untouched
    assert node.relied_on == 0
    assert node.ledger.refusals["false-snapshot"] >= 3
    assert all(node.ledger.standing(one.peer) < 100 for one in (A, B, C))


async def test_of_two_snapshots_at_one_cut_everybody_relies_on_the_same(autojump_clock: object) -> None:
    """Both are certified: by members who hold one side of a fork, and by members who hold the other."""
    for first, second in ((0, 1), (1, 0)):
        node = Seen()
        node.keeper.held = 150
        both = [await node.snapshot(200, side=side) for side in (b"left", b"rite")]
        for turn in (first, second):
            for one in (A, B):
                node.hear(node.vote(one, both[turn]))
            await node.look_for(2 * PATIENCE_S)
        assert node.snapshots.certified is not None
        assert node.snapshots.certified.snapshot == max(both, key=encode)


async def test_a_member_that_lags_takes_over_what_a_third_vouches_for(autojump_clock: object) -> None:
    node = Seen()
    later = await node.snapshot(900)
    for one in (A, B):
        node.hear(node.vote(one, later))
    await node.look_for(PATIENCE_S - 2)
    assert node.untouched, "the batches may be on their way"
    await node.look_for(5)
    assert node.keeper.began_from == [true_state(900)]
    assert node.relied_on == 900


async def test_a_newcomer_takes_the_votes_as_they_are(autojump_clock: object) -> None:
    node = Seen()
    node.keeper.held, node.holding = 0, set()
    offered = await node.snapshot(900)
    node.hear(node.vote(A, offered))
    await node.look_for(2 * PATIENCE_S)
    assert node.relied_on == 0
    node.hear(node.vote(B, offered))
    await node.look_for(2)
    assert node.relied_on == 900


@pytest.mark.parametrize("lie", ["size", "state", "settlement", "another sum", "unsorted"])
async def test_shards_that_are_not_what_the_snapshot_names_change_nothing(
    autojump_clock: object, lie: str
) -> None:
    """The fetcher checks bytes against names (``test_shard_transfer``). What is named may still make no sense."""
    node = Seen()
    node.keeper.held, node.holding = 0, set()
    offered = await node.snapshot(900)
    match lie:
        case "size":
            offered = await node.snapshot(900, b"odd")
        case "state":
            del node.fetcher.shards[offered.state]
        case "settlement":
            garbage = await node.fetcher.offer(b"no settlement at all")
            offered = RecordSnapshot(records=900, settlement=garbage, state=offered.state)
        case "another sum":
            offered = RecordSnapshot(records=901, settlement=offered.settlement, state=offered.state)
        case "unsorted":
            entry = settlement_of(450).logs[0]
            twice = await node.fetcher.offer(encode(Settlement(logs=[entry, entry])))
            offered = RecordSnapshot(records=900, settlement=twice, state=offered.state)
    for one in (A, B):
        node.hear(node.vote(one, offered))
    await node.look_for(2 * PATIENCE_S)
    assert node.keeper.held == 0
    assert not node.keeper.began_from
    assert node.relied_on == 0


async def test_a_snapshot_of_another_run_is_nobodys_vote(autojump_clock: object) -> None:
    node = Seen()
    node.keeper.held, node.holding = 0, set()
    offered = await node.snapshot(900)
    foreign = [node.vote(one, offered, run=OTHER_RUN) for one in (A, B)]
    for packed in foreign:
        assert node.notices.offer(packed, 0.0).blames_sender
    node.hear(node.vote(C, await node.snapshot(100), await node.certificate(foreign)))
    await node.look_for(2 * PATIENCE_S)
    assert node.relied_on == 0
    assert node.ledger.refusals["false-snapshot"] == 1
    assert node.ledger.last_problem(C.peer).startswith("false-snapshot")


async def test_a_certificate_outlives_the_votes_in_it(autojump_clock: object) -> None:
    node = Seen()
    earlier, later = await node.snapshot(200), await node.snapshot(300, b"not yet.")
    node.keeper.held = 150
    ref = await node.certificate([node.vote(one, earlier) for one in (A, B)])
    for one in (A, B, C):
        node.hear(node.vote(one, replace_state(later, one), ref))
    await node.look_for(2 * PATIENCE_S)
    assert node.relied_on == 200


def replace_state(snapshot: RecordSnapshot, voter: Identity) -> RecordSnapshot:
    """Votes that do not agree with each other."""
    return RecordSnapshot(
        records=snapshot.records,
        settlement=snapshot.settlement,
        state=ShardRef(root=voter.peer.encode()[-32:], size=8),
    )


async def test_a_vote_from_the_future_keeps_nobody_from_proposing(autojump_clock: object) -> None:
    node = Seen()
    far = RecordSnapshot(
        records=2**53, settlement=ShardRef(root=bytes(32), size=9), state=ShardRef(root=bytes(32), size=9)
    )
    node.hear(node.vote(STRANGER, far))
    await node.look_for(4 * TURN_S)
    own = node.notices.body_of(SELF.peer, "snapshot", SnapshotVote)
    assert own is not None
    assert own.snapshot.records == 250


async def test_a_proposal_that_cannot_be_fetched_delays_ours_and_no_more(autojump_clock: object) -> None:
    node = Seen()
    hollow = RecordSnapshot(
        records=200, settlement=ShardRef(root=bytes(32), size=9), state=ShardRef(root=bytes(32), size=9)
    )
    node.hear(node.vote(A, hollow))
    await node.look_for(PATIENCE_S - 2)
    assert node.notices.get(SELF.peer, "snapshot") is None
    await node.look_for(4 * TURN_S)
    assert node.notices.get(SELF.peer, "snapshot") is not None


async def test_certificates_without_end_take_no_memory_without_end(autojump_clock: object) -> None:
    """To a newcomer, who has nothing to tell by whose votes are worth something."""
    node = Seen(votes_needed=1)
    node.keeper.held, node.holding = 0, set()
    hollow = ShardRef(root=bytes(32), size=9)
    for records in range(1, 3 * CANDIDATES_MAX):
        node.hear(node.vote(A, RecordSnapshot(records=records, settlement=hollow, state=hollow)))
        await node.snapshots.look()
    assert len(node.snapshots._votes._candidates) == CANDIDATES_MAX


async def test_a_banned_members_vote_is_not_heard(autojump_clock: object) -> None:
    node = Seen()
    later = await node.snapshot(900)
    for one in (A, B):
        node.hear(node.vote(one, later))
    while not node.ledger.banned(B.peer):
        node.ledger.note(B.peer, "hash")
    await node.look_for(2 * PATIENCE_S)
    assert node.untouched
