"""Moving shards between peers: served on request, pulled from several holders at once, checked chunk by chunk.

Owns both ends of SHARD_PROTOCOL. Never decides which shard is wanted, and never stores one: ``fetch`` hands the
bytes back. Relies on ``gossip.store`` for what a shard's root means.

The hot path: requests are pipelined on one stream per holder, and a chunk's bytes travel outside frames. A chunk
is checked as soon as it is complete, and a shard takes no memory before its bytes are here, whatever size it claims.
Once asked for, bytes are read at full speed; a rate limit delays the next request instead (a receiver that
stops reading makes the sender give the stream up).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from typing import NoReturn

import trio
from blake3 import blake3

from gossip.ledger import PeerLedger
from gossip.messages import (
    CHUNK_BYTES,
    SHARD_PROTOCOL,
    ChunkFollows,
    NotHeld,
    Outline,
    ShardRef,
    WantChunk,
    WantOutline,
)
from gossip.store import ShardMissing, ShardStore, chunk_count, chunk_size, ref_of
from p2p.errors import GossamerError, MalformedMessage, StreamBroken, TransportError
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.limits import Limits
from p2p.pacer import Pacer
from p2p.patience import renew
from p2p.transport import PeerId, Transport

HOLDERS_AT_ONCE_MAX = 4
"""Holders one fetch pulls from in parallel; the others stand by."""
GIVEN_KEPT = 64
"""Shards of which it is remembered who sent them: more than one merge has pieces."""
REQUEST_BYTES_MAX = 1024
OUTLINE_BYTES_MAX = 64 << 10
PACED_PIECE_BYTES = 64 << 10
STREAM_IDLE_S = 60.0
"""A stream on which nothing is asked for this long is closed by the server."""


class FetchFailed(GossamerError):
    """No holder delivered the whole shard in time; ``why`` lists what went wrong with each."""


# --- serving ----------------------------------------------------------------------------------------------------


class ShardServer:
    """Answers WantOutline and WantChunk from the store, many per stream, in the order asked."""

    def __init__(
        self,
        *,
        transport: Transport,
        store: ShardStore,
        ledger: PeerLedger,
        pacer: Pacer | None = None,
    ) -> None:
        self._transport = transport
        self._store = store
        self._ledger = ledger
        self._pacer = pacer

    def serve(self) -> None:
        """Start answering; to be called once."""
        self._transport.serve(SHARD_PROTOCOL, self._answer_stream)

    async def _answer_stream(self, peer: PeerId, stream: FlowStream) -> None:
        if self._ledger.shuns(peer):
            return
        while True:
            request = None
            with trio.move_on_after(STREAM_IDLE_S):
                try:
                    request = await receive_message(
                        stream, WantOutline | WantChunk, bytes_max=REQUEST_BYTES_MAX
                    )
                except MalformedMessage as error:
                    self._ledger.note(peer, "malformed", error.what)
                    raise
            if request is None:
                return
            try:
                if isinstance(request, WantOutline):
                    await send_message(stream, await self._store.outline(request.shard))
                else:
                    await self._send_chunk(peer, stream, request)
            except ShardMissing:
                await send_message(stream, NotHeld())

    async def _send_chunk(self, peer: PeerId, stream: FlowStream, request: WantChunk) -> None:
        size = chunk_size(request.shard, request.index)
        if size <= 0:
            raise ShardMissing(f"there is no chunk {request.index} in a shard of {request.shard.size} bytes")
        data = await self._store.get(request.shard)
        start = request.index * CHUNK_BYTES
        await send_message(stream, ChunkFollows(size=size))
        chunk = memoryview(data)[start : start + size]
        # Under a rate limit the chunk leaves in small pieces, so that nobody waits long enough to call it a stall.
        step = size if self._pacer is None else PACED_PIECE_BYTES
        for offset in range(0, size, step):
            piece = chunk[offset : offset + step]
            if self._pacer is not None:
                await self._pacer.wait_to_spend(len(piece))
            try:
                await stream.send_all(piece)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise StreamBroken(f"could not send: {error}") from error


# --- fetching ---------------------------------------------------------------------------------------------------


class _HolderFailed(Exception):
    """This holder is of no more use to this fetch; ``reason`` is what the ledger notes."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ShardFetcher:
    """Pulls shards by name. At most ``limits.fetches_max`` run at once; others wait their turn.

    ``reach(peer)`` connects to a peer that is not connected yet, or raises PeerUnreachable.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        reach: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        self.transport = transport
        self.ledger = ledger
        self.limits = limits
        self.reach = reach
        self._rng = rng
        self._slots = trio.CapacityLimiter(limits.fetches_max)
        self.bytes_pulled: Counter[PeerId] = Counter()
        """Checked bytes received since the start, by holder."""
        self._jobs: list[_Job] = []
        self._given: deque[tuple[ShardRef, set[PeerId]]] = deque(maxlen=GIVEN_KEPT)

    def progress_of(self, ref: ShardRef) -> tuple[int, set[PeerId]]:
        """Checked bytes of a shard that is being fetched, 0 of any other; who has sent parts of it, of late or now."""
        jobs = [job for job in self._jobs if job.ref == ref]
        given = [givers for done, givers in self._given if done == ref]
        return max((job.received for job in jobs), default=0), set().union(
            *given, *(job.givers for job in jobs)
        )

    async def fetch(
        self, ref: ShardRef, holders: Sequence[PeerId], *, timeout_s: float, pacer: Pacer | None = None
    ) -> bytes:
        """The bytes of a shard, every chunk checked, from as many of ``holders`` as it takes.

        Chunks that arrived outlive the holder that sent them; what it still owed is asked of others.
        ``pacer`` bounds the rate, together with everything else that shares it. Raises FetchFailed.
        """
        if ref.size > self.limits.shard_bytes_max:
            raise FetchFailed(f"a shard of {ref.size} bytes, the limit is {self.limits.shard_bytes_max}")
        usable = [peer for peer in holders if not self.ledger.shuns(peer)]
        self._rng.shuffle(usable)
        job = _Job(ref, deque(usable))
        self._jobs.append(job)
        try:
            with trio.move_on_after(timeout_s) as deadline:
                async with self._slots, trio.open_nursery() as nursery:
                    for _ in usable[:HOLDERS_AT_ONCE_MAX]:
                        nursery.start_soon(self._work, job, pacer, nursery.cancel_scope)
        finally:
            self._jobs.remove(job)
            self._given.append((ref, job.givers))
        if not job.missing:
            return b"".join(job.chunks)
        if deadline.cancelled_caught:
            job.failures.append(f"not done after {timeout_s:g} s")
        raise FetchFailed(
            f"shard {ref.root.hex()[:12]} of {ref.size} bytes could not be fetched",
            why="; ".join(job.failures) or "nobody is known to hold it",
            fix="it is asked for again when somebody offers it",
        )

    async def _work(self, job: _Job, pacer: Pacer | None, everybody: trio.CancelScope) -> None:
        """Pull from one holder after another until the shard is complete or no holder is left."""
        while job.holders and job.missing:
            peer = job.holders.popleft()
            try:
                await _Pull(self, job, peer, pacer).run()
            except _HolderFailed as failure:
                self.ledger.note(peer, failure.reason, failure.detail)
                job.failures.append(f"{peer}: {failure}")
            except TransportError as error:
                job.failures.append(f"{peer}: {error.what}")
        if not job.missing:
            everybody.cancel()

    def count_pulled(self, peer: PeerId, size: int) -> None:
        """Credit ``peer`` with ``size`` checked bytes."""
        self.bytes_pulled[peer] += size
        if len(self.bytes_pulled) > self.limits.address_book_max:
            del self.bytes_pulled[min(self.bytes_pulled, key=self.bytes_pulled.__getitem__)]


class _Job:
    """One shard on its way: its bytes so far, the chunks nobody was asked for, the holders not tried yet."""

    def __init__(self, ref: ShardRef, holders: deque[PeerId]) -> None:
        self.ref = ref
        self.holders = holders
        self.contested = len(holders) > 1
        self.chunks = [b""] * chunk_count(ref)
        self.hashes: list[bytes] | None = None
        self.unasked = deque(range(len(self.chunks)))
        self.missing = len(self.chunks)
        self.givers: set[PeerId] = set()
        self.failures: list[str] = []
        self._handed_back = trio.Event()

    @property
    def received(self) -> int:
        """Checked bytes that are here."""
        return sum(map(len, self.chunks))

    def hand_back(self, chunks: Sequence[int]) -> None:
        """Chunks that a failed holder still owed are for others to ask."""
        self.unasked.extendleft(reversed(chunks))
        self._handed_back.set()
        self._handed_back = trio.Event()

    async def wait_handed_back(self) -> None:
        """Wait until there is a chunk to ask for again."""
        await self._handed_back.wait()

    def accept_outline(self, outline: Outline) -> None:
        """Believe an outline once it hashes to the root. Raises _HolderFailed."""
        if ref_of(outline) != self.ref or len(outline.chunks) != chunk_count(self.ref):
            raise _HolderFailed("hash", "an outline that does not match the shard's root")
        self.hashes = outline.chunks

    def accept_chunk(self, index: int, chunk: bytes, giver: PeerId) -> None:
        """Keep a chunk from ``giver`` if it matches its hash. Raises _HolderFailed."""
        digest = blake3(chunk).digest()
        if self.hashes is None:
            # A shard of one chunk needs no outline: its only possible outline follows from the chunk.
            self.accept_outline(Outline(size=self.ref.size, chunks=[digest]))
        elif self.hashes[index] != digest:
            raise _HolderFailed("hash", f"chunk {index} does not match its hash")
        self.chunks[index] = chunk
        self.missing -= 1
        self.givers.add(giver)


class _Pull:
    """One stream to one holder: requests go ahead of the bytes, which come back in the order asked."""

    def __init__(self, fetcher: ShardFetcher, job: _Job, peer: PeerId, pacer: Pacer | None) -> None:
        self._fetcher = fetcher
        self._limits = fetcher.limits
        self._job = job
        self._peer = peer
        self._pacer = pacer
        self._owed: deque[int] = deque()

    async def run(self) -> None:
        """Pull until the shard is complete. Raises _HolderFailed or TransportError; what was owed is handed back."""
        await self._fetcher.reach(self._peer)
        stream = await self._fetcher.transport.open_stream(self._peer, SHARD_PROTOCOL)
        try:
            with closing(stream):
                await self._pull(stream)
        except MalformedMessage as error:
            raise _HolderFailed("malformed", error.what) from error
        except (StreamBroken, trio.BrokenResourceError) as error:
            if not stream.agreed:  # It has begun nothing that it could break off.
                raise StreamBroken(f"no answer: {error}") from error
            raise _HolderFailed("broken", str(error)) from error
        finally:
            self._job.hand_back(self._owed)

    async def _pull(self, stream: FlowStream) -> None:
        job = self._job
        if job.contested:
            # The first to answer is asked first, and one that does not answer keeps no chunk from the others.
            await stream.wait_agreed()
        outline_owed = job.hashes is None and chunk_count(job.ref) > 1
        if outline_owed:
            await send_message(stream, WantOutline(shard=job.ref))
        while job.missing:
            while self._may_ask():
                index = job.unasked.popleft()
                self._owed.append(index)
                if self._pacer is not None:
                    self._pacer.spend(chunk_size(job.ref, index))
                await send_message(stream, WantChunk(shard=job.ref, index=index))
            await stream.wait_agreed()  # What a holder owes falls due from its first answer on.
            if outline_owed:
                job.accept_outline(await self._receive_outline(stream))
                outline_owed = False
            elif self._owed:
                index = self._owed[0]
                job.accept_chunk(index, await self._receive_chunk(stream, index), self._peer)
                self._owed.popleft()
                self._fetcher.count_pulled(self._peer, chunk_size(job.ref, index))
            elif job.unasked and self._pacer is not None:
                await trio.sleep(self._pacer.delay_s())
            else:
                await job.wait_handed_back()

    def _may_ask(self) -> bool:
        return (
            len(self._owed) < self._limits.chunks_in_flight_per_peer
            and bool(self._job.unasked)
            and (self._pacer is None or self._pacer.delay_s() == 0.0)
        )

    async def _receive_outline(self, stream: FlowStream) -> Outline:
        with trio.move_on_after(self._limits.chunk_stall_s):
            reply = await receive_message(stream, Outline | NotHeld, bytes_max=OUTLINE_BYTES_MAX)
            if isinstance(reply, Outline):
                return reply
            self._refuse(reply)
        raise _HolderFailed("stall", "no outline in time")

    async def _receive_chunk(self, stream: FlowStream, index: int) -> bytes:
        """The chunk that is due, within ``chunk_timeout_s`` and with no pause above ``chunk_stall_s``."""
        size = missing = chunk_size(self._job.ref, index)
        pieces: list[bytes] = []
        latest_s = trio.current_time() + self._limits.chunk_timeout_s
        with trio.CancelScope() as scope:
            scope.deadline = min(latest_s, trio.current_time() + self._limits.chunk_stall_s)
            reply = await receive_message(stream, ChunkFollows | NotHeld, bytes_max=REQUEST_BYTES_MAX)
            if not isinstance(reply, ChunkFollows):
                self._refuse(reply)
            elif reply.size != size:
                raise _HolderFailed("malformed", f"{reply.size} bytes for a chunk of {size}")
            while missing:
                renew(scope, self._limits.chunk_stall_s, latest_s=latest_s)
                piece = bytes(await stream.receive_some(missing))
                if not piece:
                    raise StreamBroken(f"the stream ended {missing} bytes early")
                pieces.append(piece)
                missing -= len(piece)
        if scope.cancelled_caught:
            raise _HolderFailed("stall", f"chunk {index} came too slowly")
        return b"".join(pieces)

    def _refuse(self, reply: NotHeld | None) -> NoReturn:
        if reply is None:
            raise StreamBroken("the holder closed the stream")
        raise _HolderFailed("not-held", "does not hold the shard")
