"""Bugs to plant: each replaces one piece of the product by a defective one for the length of a block.

The product has no switch for them. Each is a mistake somebody could make, or has made in a rival system. Where a second
check would refuse its result before it does harm, that check is taken away with it: what is tested are the checkers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import trio

from gossip import ledger, merge_member, merge_proposer, merge_record, merge_work
from gossip.anti_entropy import AntiEntropy
from gossip.disk import Disk
from gossip.members import MemberTable
from gossip.merge_acceptor import AcceptorState
from gossip.merge_effects import Effect
from gossip.merge_member import MergeMember
from gossip.merge_proposer import Proposal
from gossip.merge_record import Link
from gossip.messages import (
    PACKED_NOTICE_BYTES_MAX,
    AcceptedRecord,
    Ballot,
    Heartbeat,
    MergeRecord,
    Notice,
    Outbid,
    Outline,
    PieceResult,
    ShardRef,
)
from gossip.notices import NoticeTable, Verdict, _register_key
from gossip.shard_transfer import _Job
from netsim.quadratic import Quadratic
from node import life
from node.checkpoints import Checkpoints
from node.life import NodeState
from node.merge_host import NodeMergeHost
from p2p.codec import decode
from p2p.flow import FlowStream
from p2p.transport import PeerId
from training.codecs import plain
from training.mixing import Yardstick

Plant = Callable[[], contextlib.AbstractContextManager[object]]


class _Unsynced:
    """A disk whose writes are never synced."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    async def write_atomic(self, path: str, data: bytes, *, sync: bool = True) -> None:
        """Write ``data`` and hope."""
        await self._disk.write_atomic(path, data, sync=False)


def hash_check_skipped() -> contextlib.AbstractContextManager[object]:
    """A fetch takes whatever bytes come for those it asked for."""

    def accept_chunk(job: _Job, index: int, chunk: bytes, giver: PeerId) -> None:
        job.chunks[index] = chunk
        job.missing -= 1

    def accept_outline(job: _Job, outline: Outline) -> None:
        job.hashes = outline.chunks

    return patch.multiple(_Job, accept_chunk=accept_chunk, accept_outline=accept_outline)


def old_notices_accepted() -> contextlib.AbstractContextManager[object]:
    """Whatever notice comes last is taken for the newest."""
    honest = NoticeTable.offer

    def offer(table: NoticeTable, packed: bytes, now_s: float) -> Verdict:
        verdict = honest(table, packed, now_s)
        notice = decode(packed, Notice, bytes_max=PACKED_NOTICE_BYTES_MAX)
        if verdict is Verdict.KNOWN and notice.author != table._signer.peer:
            del table._registers[_register_key(PeerId(notice.author), notice.kind)]
            return honest(table, packed, now_s)
        return verdict

    return patch.object(NoticeTable, "offer", offer)


def state_not_synced() -> contextlib.AbstractContextManager[object]:
    """A node begins a life whose number a power cut can take back."""
    honest = life.save_state

    async def save_state(disk: Disk, state: NodeState) -> None:
        await honest(_Unsynced(disk), state)  # type: ignore[arg-type]

    return patch.object(life, "save_state", save_state)


def promise_not_synced() -> contextlib.AbstractContextManager[object]:
    """A member gives its word before it is on disk."""
    honest = MergeMember._write

    async def write(member: MergeMember, link: Link, state: AcceptorState) -> None:
        with patch.object(member, "_disk", _Unsynced(member._disk)):
            await honest(member, link, state)

    return patch.object(MergeMember, "_write", write)


def results_not_synced() -> contextlib.AbstractContextManager[object]:
    """A member accepts a record whose results a power cut can take from it."""

    async def secure(host: NodeMergeHost, record: MergeRecord) -> None:
        host.hold(record)

    return patch.object(NodeMergeHost, "secure", secure)


@contextlib.contextmanager
def nan_check_gone() -> Iterator[None]:
    """Nobody looks at the numbers that peers send."""

    def add(learner: Quadratic, fragment: int | None, delta: torch.Tensor) -> None:
        learner._slot(fragment)[:] += delta.numpy()

    with (
        patch.object(plain, "check_finite", lambda _: None),
        patch.object(Yardstick, "check", lambda *_, **__: None),
        patch.object(Quadratic, "add", add),
    ):
        yield


@contextlib.contextmanager
def merge_set_unsorted() -> Iterator[None]:
    """Contributions are summed in the order in which they came."""
    honest = Proposal._end_call

    def end_call(proposal: Proposal) -> list[Effect]:
        if proposal._accepted:
            return honest(proposal)
        return proposal._plan(list(proposal._offers.values()))

    with (
        patch.object(Proposal, "_end_call", end_call),
        patch.object(merge_record, "_check_ascending", lambda *_: None),
    ):
        yield


def task_leaked() -> contextlib.AbstractContextManager[object]:
    """A round of reconciliation ends, its task does not."""
    honest = AntiEntropy._meet

    async def meet(sync: AntiEntropy, peer: PeerId) -> None:
        await honest(sync, peer)
        await trio.sleep_forever()

    return patch.object(AntiEntropy, "_meet", meet)


def closed_stream_kept() -> contextlib.AbstractContextManager[object]:
    """A stream that was closed at both ends keeps its place in the connection."""

    def close(stream: FlowStream) -> None:
        if not (stream._closed or stream._broken or stream._eof_sent):
            stream._eof_sent = True
            stream._sink.send_eof(stream)
        stream._closed = True

    return patch.object(FlowStream, "close", close)


def member_forgotten() -> contextlib.AbstractContextManager[object]:
    """Whoever has been heard of for the longest time makes room for whoever is heard of now."""
    honest = MemberTable.heard

    def heard(table: MemberTable, peer: PeerId, heartbeat: Heartbeat, now_s: float) -> None:
        honest(table, peer, heartbeat, now_s)
        if len(table._entries) > 2:
            table.forget(next(iter(table._entries)))

    return patch.object(MemberTable, "heard", heard)


def duplicate_counted() -> contextlib.AbstractContextManager[object]:
    """The first contribution enters the sum a second time."""
    honest = NodeMergeHost.sum_piece

    async def sum_piece(
        host: NodeMergeHost, parent: bytes, piece: int, inputs: Sequence[tuple[PeerId, ShardRef, int]]
    ) -> PieceResult:
        return await honest(host, parent, piece, [*inputs, *inputs[:1]])

    return patch.object(NodeMergeHost, "sum_piece", sum_piece)


def weights_not_capped() -> contextlib.AbstractContextManager[object]:
    """A member's weight in a merge is what it says."""
    return patch.object(merge_work, "capped_weights", list)


@contextlib.contextmanager
def quorum_of_half() -> Iterator[None]:
    """Half of the electorate is enough."""

    def half(members: Sequence[PeerId]) -> int:
        return max(1, len(members) // 2)

    with patch.object(merge_record, "quorum", half), patch.object(merge_proposer, "quorum", half):
        yield


def promise_ignored() -> contextlib.AbstractContextManager[object]:
    """A member promises whatever is asked last."""

    def promise(state: AcceptorState, ballot: Ballot) -> tuple[AcceptorState, AcceptedRecord | Outbid | None]:
        return AcceptorState(parent=state.parent, promised=ballot, accepted=state.accepted), state.accepted

    return patch.object(merge_member, "promise", promise)


def acceptance_forgotten() -> contextlib.AbstractContextManager[object]:
    """A member that promises a new ballot lets go of what it accepted under an older one."""

    def promise(state: AcceptorState, ballot: Ballot) -> tuple[AcceptorState, AcceptedRecord | Outbid | None]:
        if state.promised is not None and ballot < state.promised:
            return state, Outbid(ballot=state.promised)
        return AcceptorState(parent=state.parent, promised=ballot), None

    return patch.object(merge_member, "promise", promise)


def contribution_subtracted_twice() -> contextlib.AbstractContextManager[object]:
    """A merge takes a node's own part out of its live weights once too often."""
    honest = NodeMergeHost._rebase

    def rebase(
        host: NodeMergeHost, anchor: torch.Tensor, contribution: torch.Tensor | None, moved: Sequence[int]
    ) -> None:
        honest(host, anchor, None if contribution is None else contribution + contribution, moved)

    return patch.object(NodeMergeHost, "_rebase", rebase)


def live_weights_left_behind() -> contextlib.AbstractContextManager[object]:
    """An anchor is taken, and training goes on from where it was."""
    honest = NodeMergeHost._take

    async def take(host: NodeMergeHost, *args: Any, rebase: bool, duration_s: float) -> None:
        await honest(host, *args, rebase=False, duration_s=duration_s)

    return patch.object(NodeMergeHost, "_take", take)


def old_checkpoints_deleted_first() -> contextlib.AbstractContextManager[object]:
    """Room is made for a checkpoint before it is there."""
    honest = Checkpoints.save

    async def save(checkpoints: Checkpoints, step: int, state: bytes) -> None:
        for old in await checkpoints._generations():
            await checkpoints._disk.delete(old)
        await honest(checkpoints, step, state)

    return patch.object(Checkpoints, "save", save)


def honest_peer_banned() -> contextlib.AbstractContextManager[object]:
    """Who is slow or goes away in the middle of a transfer is taken for hostile."""
    return patch.object(ledger, "COSTS", {**ledger.COSTS, "stall": 100.0, "broken": 100.0})
