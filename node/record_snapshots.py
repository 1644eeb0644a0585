"""Snapshots in one-byte mode: who proposes one, who confirms it, and who relies on it.

Owns this node's votes and the counting of everybody's. A snapshot is a settlement, which says which records, and the
state that these come to, both shards by content. A vote is a notice that names both, and whoever votes has worked the
state out itself, by taking back what is newer. With votes enough a snapshot is certified: no fork takes back what it
holds, a newcomer begins from it, and the batches below the one before it are let go of.

Names cost nothing, so a third of the members that are alive and hold records must have voted for it or rely on it: two
keys certify nothing in a swarm of more than six. What is held here is relied on only if it comes out here, too. Who
knows no such member has to take the votes as they are. Parts of a swarm that were cut off from each other go over to
the snapshot of most records that a third of all stand for; a smaller part goes over to what two thirds stand for.

Never touches weights: a ``Keeper`` is what it asks for a state, and tells of a certified one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio
from blake3 import blake3

from gossip.ledger import PeerLedger
from gossip.messages import LOGS_MAX, Certificate, RecordSnapshot, Settlement, ShardRef, SnapshotVote
from gossip.notices import NoticeTable
from gossip.shard_transfer import FetchFailed, ShardFetcher
from gossip.store import ShardMissing, ShardStore, StoreFull, outline_of
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.transport import PeerId

LOOK_S = 2.0
TURN_S = 10.0
"""Between the turns of members to propose a snapshot that is due."""
PATIENCE_S = 20.0
"""How long batches may be on their way before a certified snapshot that holds them is fetched instead."""
OUTVOTED_S = 60.0
"""How long two thirds must have relied on another snapshot than ours before we go over to it although ours is later:
those who are a little behind us are not meant."""
FETCH_TIMEOUT_S = 600.0
SETTLEMENT_BYTES_MAX = 200 * LOGS_MAX
CERTIFICATE_BYTES_MAX = 1 << 20

CANDIDATES_MAX = 64
"""Certified snapshots that are looked at side by side."""
REMEMBERED_MAX = 4096
"""Certificates that need not be read again, and snapshots that need not be worked out again."""

log = structlog.get_logger()


class Keeper(Protocol):
    """The records of this node, and the weights that hold them."""

    @property
    def records(self) -> int:
        """How many count."""

    def settlement(self) -> Settlement:
        """Which ones."""

    async def state_of(self, settlement: Settlement) -> bytes | None:
        """The state that ``settlement`` comes to; None while it holds what does not count here."""

    async def settle(self, settlement: Settlement) -> bool:
        """Let what it holds be final, and nothing else; False while not all of it is held here."""

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        """Hold it and what is known beyond it, and nothing else. Raises ValueError."""

    async def forget(self, certified: Certified) -> bool:
        """Let go of the batches that a certified snapshot holds; False if some of them are not final any more."""


@dataclass(frozen=True, slots=True)
class Certified:
    """A snapshot that enough members came to, and their votes."""

    snapshot: RecordSnapshot
    settlement: Settlement
    certificate: Certificate


class RecordSnapshots:
    """The snapshots of one run, as one node sees them."""

    def __init__(
        self,
        *,
        local: PeerId,
        notices: NoticeTable,
        store: ShardStore,
        fetcher: ShardFetcher,
        ledger: PeerLedger,
        keeper: Keeper,
        alive: Callable[[], Sequence[PeerId]],
        learned: Callable[[], Collection[PeerId]],
        every_records: int,
        votes_needed: int,
    ) -> None:
        """``alive()``: the members that are, ourselves included; ``learned()``: those of them that hold records."""
        self._local = local
        self._notices = notices
        self._store = store
        self._fetcher = fetcher
        self._ledger = ledger
        self._keeper = keeper
        self._alive = alive
        self._learned = learned
        self._every = every_records
        self._needed = votes_needed
        self._voted: RecordSnapshot | None = None
        self._refused: set[RecordSnapshot] = set()
        """Snapshots that do not come out here."""
        self._due: tuple[int, float] = (0, 0.0)
        """The height that is due, and since when."""
        self._candidates: dict[RecordSnapshot, dict[PeerId, bytes]] = {}
        """Certified snapshots that we do not rely on yet, and the votes for them."""
        self._behind_since_s: float | None = None
        """Since when there is one of which not everything is held here."""
        self._certificate: ShardRef | None = None
        self._relied_on: dict[ShardRef, RecordSnapshot] = {}
        """What the certificates certify that have been read."""
        self._outvoted: dict[RecordSnapshot, float] = {}
        """Snapshots that two thirds rely on and we do not, and since when."""
        self._read_certificates: dict[ShardRef, float] = {}
        """Until when those of others need not be looked at again."""
        self._base = ""
        """For whom the shards of the snapshot are kept below which batches were let go of."""
        self.certified: Certified | None = None

    @property
    def offered(self) -> bool:
        """Whether members tell of a certified snapshot, or enough of them vote for one."""
        votes = self._votes()
        certified = any(vote.certificate is not None for vote, _ in self._told())
        return certified or any(len(voters) >= self._needed for voters in votes.values())

    async def run(self) -> None:
        """Propose, confirm and certify until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Do whatever is due now."""
        if not self._every:
            return
        self._count_votes()
        await self._read_what_others_rely_on()
        self._note_majorities()
        await self._certify()
        members = set(self._learned()) - {self._local}
        for vote, peer in self._told():
            snapshot = vote.snapshot
            if peer in members and snapshot.records > self._settled() and snapshot not in self._refused:
                await self._consider(snapshot, peer)
        await self._propose()

    async def resume(self, certified: Certified) -> None:
        """Go on from a certified snapshot of an earlier life, and vouch for it again."""
        self.certified, self._voted = certified, certified.snapshot
        self._base = self._keep(certified.snapshot)
        await self._tell()

    def _told(self) -> list[tuple[SnapshotVote, PeerId]]:
        found = []
        for peer in self._notices.authors():
            vote = self._notices.body_of(peer, "snapshot", SnapshotVote)
            if vote is not None and not self._ledger.banned(peer):
                found.append((vote, peer))
        return found

    def _votes(self) -> dict[RecordSnapshot, list[PeerId]]:
        votes: dict[RecordSnapshot, list[PeerId]] = {}
        for vote, peer in self._told():
            votes.setdefault(vote.snapshot, []).append(peer)
        return votes

    def _settled(self) -> int:
        """Records of the latest snapshot that we voted for or rely on."""
        known = [self._voted, self.certified.snapshot if self.certified else None]
        return max((snapshot.records for snapshot in known if snapshot), default=0)

    def _keep(self, snapshot: RecordSnapshot) -> str:
        owner = f"records/{snapshot.records}"
        for shard in (snapshot.settlement, snapshot.state):
            self._store.pin(shard, owner)
        return owner

    async def _tell(self) -> None:
        """Publish our vote, and what we rely on."""
        assert self._voted is not None
        if self.certified is not None:
            try:
                await self._store.release("certificate")
                data = encode(self.certified.certificate)
                self._certificate = await self._store.put(data, owner="certificate")
            except (StoreFull, OSError) as error:
                log.warning("certificate not kept", error=str(error))
        self._notices.publish("snapshot", SnapshotVote(snapshot=self._voted, certificate=self._certificate))

    # --- voting -----------------------------------------------------------------------------------------------------

    async def _propose(self) -> None:
        height = self._keeper.records // self._every
        if height == 0 or (self._voted is not None and height <= self._voted.records // self._every):
            return
        now_s = trio.current_time()
        if self._due[0] != height:
            self._due = (height, now_s)
        told = {vote.snapshot for vote, _ in self._told()} - self._refused
        in_turn = any(height == snapshot.records // self._every for snapshot in told)
        if in_turn and now_s - self._due[1] < PATIENCE_S:
            return  # Somebody has proposed one. Unless nobody can come to it, we shall.
        ranked = sorted(self._alive(), key=lambda peer: blake3(f"{height}/{peer}".encode()).digest())
        if now_s - self._due[1] < TURN_S * ranked.index(self._local):
            return
        settlement = self._keeper.settlement()
        state = await self._keeper.state_of(settlement)
        if state is not None:
            await self._vote(settlement, state)

    async def _consider(self, snapshot: RecordSnapshot, peer: PeerId) -> None:
        """Come to the same snapshot, if all of it counts here."""
        settlement = await self._settlement(snapshot, [peer])
        if settlement is None:
            return
        state = await self._keeper.state_of(settlement)
        if state is None:
            return
        ref, _ = await outline_of(state)
        if ref != snapshot.state:
            self._does_not_come_out(snapshot, [peer])
            return
        await self._vote(settlement, state)

    def _does_not_come_out(self, snapshot: RecordSnapshot, voters: Collection[PeerId]) -> None:
        self._refuse(snapshot)
        for peer in voters:
            self._ledger.note(peer, "false-snapshot", f"of {snapshot.records:,} records")
        log.warning("a snapshot does not come out here", records=snapshot.records, voters=sorted(voters))

    async def _vote(self, settlement: Settlement, state: bytes) -> None:
        records = sum(entry.end for entry in settlement.logs)
        owner = f"records/{records}"
        try:
            snapshot = RecordSnapshot(
                records=records,
                settlement=await self._store.put(encode(settlement), owner=owner, sync=True),
                state=await self._store.put(state, owner=owner, sync=True),
            )
        except (StoreFull, OSError) as error:
            log.warning("snapshot not kept", error=str(error))
            return
        previous, self._voted = self._voted, snapshot
        await self._tell()
        if previous is not None and (
            self.certified is None or previous.records > self.certified.snapshot.records
        ):
            await self._store.release(f"records/{previous.records}")
        log.info("voted for a snapshot", records=records)

    # --- certifying -------------------------------------------------------------------------------------------------

    def _enough(self, snapshot: RecordSnapshot, voters: Collection[PeerId]) -> bool:
        """Whether what these members voted for is to be relied on."""
        voters = {peer for peer in voters if not self._ledger.banned(peer)}
        members = set(self._learned())
        knows_nobody = members <= {self._local}
        standing = members & (voters | self._relying(snapshot))
        return len(voters) >= self._needed and (knows_nobody or 3 * len(standing) >= len(members))

    def _relying(self, snapshot: RecordSnapshot) -> set[PeerId]:
        """Those who say that they rely on it."""
        return {
            peer
            for vote, peer in self._told()
            if vote.certificate is not None and self._relied_on.get(vote.certificate) == snapshot
        }

    def _note_majorities(self) -> None:
        members = set(self._learned())
        ours = self.certified.snapshot if self.certified is not None else None
        found = {
            snapshot
            for snapshot in set(self._relied_on.values()) - {ours}
            if 3 * len(members & self._relying(snapshot)) > 2 * len(members)
        }
        now_s = trio.current_time()
        self._outvoted = {snapshot: self._outvoted.get(snapshot, now_s) for snapshot in found}

    def _count_votes(self) -> None:
        for snapshot, voters in self._votes().items():
            packed = ((peer, self._notices.packed(peer, "snapshot")) for peer in voters)
            self._add_votes(snapshot, {peer: notice for peer, notice in packed if notice is not None})

    def _add_votes(self, snapshot: RecordSnapshot, votes: dict[PeerId, bytes]) -> bool:
        """Returns whether these, with those that are known, are enough."""
        votes = {**self._candidates.get(snapshot, {}), **votes}
        if not self._enough(snapshot, votes):
            return False
        self._candidates[snapshot] = votes
        if len(self._candidates) > CANDIDATES_MAX:
            del self._candidates[min(self._candidates, key=_order)]
        return True

    async def _read_what_others_rely_on(self) -> None:
        """Certificates of snapshots whose voters have voted for later ones since, or are gone."""
        for vote, peer in self._told():
            ref, now_s = vote.certificate, trio.current_time()
            if (
                ref is None
                or ref.size > CERTIFICATE_BYTES_MAX
                or now_s < self._read_certificates.get(ref, 0.0)
            ):
                continue
            try:
                data = await self._fetch(ref, [peer])
            except (FetchFailed, StoreFull, OSError):
                continue
            if len(self._read_certificates) >= REMEMBERED_MAX:
                self._read_certificates.clear()
                self._relied_on.clear()
            self._read_certificates[ref] = math.inf
            try:
                certificate = decode(data, Certificate, bytes_max=CERTIFICATE_BYTES_MAX)
            except MalformedMessage as error:
                self._ledger.note(peer, "malformed", error.what)
                continue
            found = self._certified_by(certificate)
            if found is None:
                self._ledger.note(peer, "false-snapshot", "a certificate that certifies nothing")
                continue
            self._relied_on[ref] = found[0]
            if not self._is_news(found[0]):
                self._read_certificates[ref] = now_s + PATIENCE_S
            elif not self._add_votes(*found):
                # Those who voted may become known here, or more of them.
                self._read_certificates[ref] = now_s + PATIENCE_S
                self._ledger.note(peer, "unvouched", "a snapshot for which too few have voted that we know")

    def _certified_by(self, certificate: Certificate) -> tuple[RecordSnapshot, dict[PeerId, bytes]] | None:
        """The snapshot that enough different members have voted for, and their votes."""
        votes: dict[PeerId, bytes] = {}
        snapshots = set()
        for packed in certificate.votes:
            vote = self._notices.verified(packed, SnapshotVote)
            if vote is None:
                return None
            votes[vote[0]] = packed
            snapshots.add(vote[1].snapshot)
        if len(snapshots) != 1 or len(votes) < self._needed:
            return None
        return snapshots.pop(), votes

    def _is_news(self, snapshot: RecordSnapshot) -> bool:
        """Whether we should go over to ``snapshot`` once it is certified."""
        if snapshot in self._refused:
            return False
        if self.certified is None or _order(snapshot) > _order(self.certified.snapshot):
            return True
        outvoted_s = trio.current_time() - self._outvoted.get(snapshot, math.inf)
        return outvoted_s > OUTVOTED_S

    async def _certify(self) -> None:
        """Rely on the latest certified snapshot, once all of it is held here, or has been for too long not."""
        self._candidates = {
            snapshot: votes for snapshot, votes in self._candidates.items() if self._is_news(snapshot)
        }
        if not self._candidates:
            return
        best = max(self._candidates, key=_order)
        holders = [
            peer for vote, peer in self._told() if vote.snapshot == best or vote.certificate is not None
        ]
        settlement = await self._settlement(best, holders)
        if settlement is None:
            return
        if best != self._voted:
            state = await self._keeper.state_of(settlement)
            if state is not None and (await outline_of(state))[0] != best.state:
                self._does_not_come_out(best, self._candidates[best])
                return
        began = False
        if not await self._keeper.settle(settlement):
            now_s = trio.current_time()
            self._behind_since_s = self._behind_since_s or now_s
            if self._keeper.records and now_s - self._behind_since_s < PATIENCE_S:
                return
            if not await self._begin_from(best, settlement, holders):
                return
            began = True
        self._behind_since_s = None
        await self._hold(best, settlement)
        certificate = Certificate(votes=[packed for _, packed in sorted(self._candidates[best].items())])
        before, self.certified = self.certified, Certified(best, settlement, certificate)
        if self._voted is None or self._voted.records < best.records:
            self._voted = best
        log.info("snapshot certified", records=best.records)
        await self._tell()
        if began:
            before = self.certified  # What is held goes on from this one now, and from none before it.
        if before is None:
            return
        stale, owner = self._base, self._keep(before.snapshot)
        if await self._keeper.forget(before):
            self._base = owner
        else:
            stale = owner
        if stale not in ("", self._base):
            await self._store.release(stale)

    async def _hold(self, snapshot: RecordSnapshot, settlement: Settlement) -> None:
        """Have the shards of a snapshot that is relied on: newcomers ask for them, and so may our next life."""
        self._keep(snapshot)
        if not self._store.holds(snapshot.state):
            state = await self._keeper.state_of(settlement)
            if state is not None and (await outline_of(state))[0] == snapshot.state:
                with contextlib.suppress(StoreFull, OSError):
                    await self._store.put(state, owner=f"records/{snapshot.records}", sync=True)
        with contextlib.suppress(FetchFailed, StoreFull, OSError):
            data = await self._fetch(snapshot.settlement, [])
            await self._store.put(data, owner=f"records/{snapshot.records}", sync=True)

    async def _begin_from(
        self, snapshot: RecordSnapshot, settlement: Settlement, holders: Sequence[PeerId]
    ) -> bool:
        """Take a certified snapshot over from those who hold it; returns whether that went well."""
        try:
            state = await self._fetch(snapshot.state, holders)
            await self._keeper.begin_from(settlement, state)
        except (FetchFailed, StoreFull, ValueError, OSError) as error:
            log.warning("snapshot not taken over", records=snapshot.records, error=str(error))
            return False
        return True

    async def _settlement(self, snapshot: RecordSnapshot, holders: Sequence[PeerId]) -> Settlement | None:
        """Which records ``snapshot`` holds; None while that cannot be had, or is not what a snapshot may hold."""
        if snapshot.settlement.size > SETTLEMENT_BYTES_MAX:
            self._refuse(snapshot)
            return None
        try:
            data = await self._fetch(snapshot.settlement, holders)
            settlement = decode(data, Settlement, bytes_max=SETTLEMENT_BYTES_MAX)
        except MalformedMessage:
            self._refuse(snapshot)
            return None
        except (FetchFailed, StoreFull, OSError):
            return None
        names = [(entry.author, entry.incarnation) for entry in settlement.logs]
        if names != sorted(set(names)) or sum(entry.end for entry in settlement.logs) != snapshot.records:
            self._refuse(snapshot)
            return None
        return settlement

    def _refuse(self, snapshot: RecordSnapshot) -> None:
        if len(self._refused) >= REMEMBERED_MAX:
            self._refused.clear()
        self._refused.add(snapshot)

    async def _fetch(self, ref: ShardRef, holders: Sequence[PeerId]) -> bytes:
        with contextlib.suppress(ShardMissing):
            return await self._store.get(ref)
        others = [peer for peer in holders if peer != self._local]
        data = await self._fetcher.fetch(ref, others, timeout_s=FETCH_TIMEOUT_S)
        await self._store.put(data)
        return data


def _order(snapshot: RecordSnapshot) -> tuple[int, bytes]:
    """Of two certified snapshots the greater one is relied on, by everybody."""
    return snapshot.records, encode(snapshot)
