"""Catching up with a chain that went on without us, or with a branch that outranks ours.

Owns who has hinted at which better head. A branch is fetched from its newest record back to one that is held here,
and nothing of it is used before all of it is verified. A newcomer, and whoever was away for longer than records are
kept, has to take the oldest record that is still to be had at its word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from gossip.merge_chain import MergeChain
from gossip.merge_record import Link, RecordRefused, check_committed, check_rootless, outranks, record_hash
from gossip.merge_shape import MergeShape
from gossip.messages import CommittedRecord, MergeReply, WantRecord
from p2p.errors import GossamerError
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerId

HEADS_REFUSED_KEPT = 256
"""Heads that did not verify, or do not outrank ours: not fetched again with every heartbeat."""


class MergeCatchUp:
    """Fetches and verifies branches. ``ask(peer, request)`` raises GossamerError when there is no reply."""

    def __init__(
        self,
        *,
        chain: MergeChain,
        run: bytes,
        shape: MergeShape,
        signer: Signer,
        limits: Limits,
        ask: Callable[[PeerId, WantRecord], Awaitable[MergeReply]],
        extend: Callable[[list[CommittedRecord]], Awaitable[None]],
        note: Callable[[PeerId, str, str], None],
    ) -> None:
        self._chain = chain
        self._run = run
        self._shape = shape
        self._signer = signer
        self._limits = limits
        self._ask = ask
        self._extend = extend
        self._note = note
        self._hints: dict[PeerId, bytes] = {}
        self._hinted = trio.Event()
        self._refused: deque[bytes] = deque(maxlen=HEADS_REFUSED_KEPT)

    def hint(self, peer: PeerId, head: bytes) -> None:
        """``peer`` holds a record that may be, or lead to, a better head."""
        if head in self._refused or self._chain.link_after(head) is not None:
            return
        if peer in self._hints or len(self._hints) < self._limits.members_max:
            self._hints[peer] = head
            self._hinted.set()

    async def run(self) -> None:
        """Follow hints, one at a time, until cancelled."""
        while True:
            while self._hints:
                peer, head = self._hints.popitem()
                try:
                    await self._climb(peer, head)
                except RecordRefused as refused:
                    self._refused.append(head)
                    self._note(peer, refused.code, refused.what)
                except (GossamerError, OSError):
                    continue  # The peer's next heartbeat hints again.
            self._hinted = trio.Event()
            await self._hinted.wait()

    async def _climb(self, peer: PeerId, head: bytes) -> None:
        branch = await self._fetch_branch(peer, head)
        if not branch:
            return
        link = await self._verified(branch)
        if outranks(link.participants_total, head, self._chain.link.participants_total, self._chain.head):
            await self._extend(branch)
        else:
            self._refused.append(head)  # Less than was advertised; what we hold can only grow.

    async def _fetch_branch(self, peer: PeerId, head: bytes) -> list[CommittedRecord]:
        """The records from one that follows ours, or the oldest that ``peer`` keeps, up to ``head``."""
        branch: list[CommittedRecord] = []
        wanted = head
        while self._chain.link_after(wanted) is None and len(branch) < self._limits.merge_records_kept:
            reply = await self._ask(peer, WantRecord(record=wanted))
            if not isinstance(reply, CommittedRecord):
                break
            if record_hash(reply.record) != wanted:
                raise RecordRefused("hash", "another record than the one asked for")
            branch.insert(0, reply)
            wanted = reply.record.parent
        return branch

    async def _verified(self, branch: list[CommittedRecord]) -> Link:
        """The link after ``branch``. Raises RecordRefused, or GossamerError when its root is out of reach."""
        link = self._chain.link_after(branch[0].record.parent)
        if link is None:
            behind = branch[-1].record.height - (self._chain.link.height - 1)
            if not self._chain.link.is_genesis and behind < self._limits.merge_records_kept:
                raise GossamerError("the branch is not held as far back as it leaves ours")
            check_rootless(branch[0], self._run, self._shape, self._signer)
        for committed in branch:
            if link is not None:
                check_committed(committed, link, self._shape, self._signer)
            link = Link.after(committed.record)
            await trio.lowlevel.checkpoint()  # Checking signatures takes a while.
        assert link is not None
        return link
