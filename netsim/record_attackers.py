"""Hostile members of runs in one-byte mode: whole nodes with one lie each, told in real messages.

Owns the lies, as ``netsim.attackers`` does for gossip mode: a node that was built and does not run yet is spoilt, and
everything else of it goes by the book. It probes, writes its log and follows those of others. What honest members must
make of it is for tests to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import trio
from msgspec.structs import replace

from gossip.messages import (
    LOG_PROTOCOL,
    LOG_SYNC_PROTOCOL,
    Heartbeat,
    Push,
    Settlement,
    WantBatches,
    WantHeads,
)
from gossip.record_batches import Batch, check, log_name, make, parse
from node.one_byte_node import OneByteNode
from p2p.codec import encode
from p2p.errors import TransportError
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.transport import PeerId

PAUSE_S = 1.0
FAR = 2**53
"""The largest number that a message can say."""


@dataclass(frozen=True, slots=True)
class RecordAttacker:
    """A lie: what it is, and how a node comes to tell it."""

    about: str
    """One line for people."""
    refused_as: str
    """The reason under which honest members count it; empty where it is no offence, but of no use."""
    spoil: Callable[[OneByteNode], None]


def _again_and_again(act: Callable[[OneByteNode], Awaitable[None]]) -> Callable[[OneByteNode], None]:
    """Have a node do ``act`` beside everything else, with pauses."""

    async def keep_on(node: OneByteNode) -> None:
        while True:
            await trio.sleep(PAUSE_S)
            await act(node)

    def spoil(node: OneByteNode) -> None:
        def begin(honest: Callable[[trio.Nursery], None], nursery: trio.Nursery) -> None:
            honest(nursery)
            nursery.start_soon(keep_on, node)

        _instead(node, "_begin", begin)

    return spoil


async def _push(node: OneByteNode, batches: Sequence[bytes]) -> None:
    """To everybody who is connected."""
    if not batches:
        return
    for peer in sorted(node.runtime.transport.peers()):
        with contextlib.suppress(TransportError):
            stream = await node.runtime.transport.open_stream(peer, LOG_PROTOCOL)
            await send_message(stream, Push(batches=list(batches)))
            await stream.aclose()


# --- batches --------------------------------------------------------------------------------------------------------


async def _forge(node: OneByteNode) -> None:
    """The next batches of others, signed by us."""
    ends = [node.logs.last(head.log) for head in node.logs.heads()]
    signer = node.runtime.signer
    await _push(
        node,
        [
            make(node.run_id, signer, end, end.incarnation, end.clock, b"\x7f" * 5)
            for end in ends
            if end is not None and end.author != node.local
        ],
    )


async def _replay(node: OneByteNode) -> None:
    """The first batches that there were, of everybody, over and over."""
    await _push(node, 20 * [batch.packed for batch in node.logs.batches() if batch.number < 3])


async def _let_the_clock_fall(node: OneByteNode) -> None:
    """A log whose clock falls after its first batch."""
    incarnation = int(trio.current_time())
    signer = node.runtime.signer
    packed = make(node.run_id, signer, None, incarnation, 5, b"\x70")
    first = _checked(node, packed, None)
    await _push(node, [packed, make(node.run_id, signer, first, incarnation, 4, b"\x70")])


async def _let_the_clock_fly(node: OneByteNode) -> None:
    """One log from the end of time, of more batches than anybody keeps waiting."""
    if node.logs.head(log_name(node.run_id, node.local, 1)) is not None:
        return
    last: Batch | None = None
    packed = []
    for _ in range(100):
        packed.append(make(node.run_id, node.runtime.signer, last, 1, FAR, b"\x70"))
        last = _checked(node, packed[-1], last)
        node.logs.offer(packed[-1])
    await _push(node, packed)


async def _flood(node: OneByteNode) -> None:
    """A log of as many records as it may have without a clock, and more."""
    size = node._rules.records_max
    last = node.logs.last(log_name(node.run_id, node.local, 2))
    if last is None:
        packed = []
        for _ in range(node._rules.allowance // size):
            packed.append(make(node.run_id, node.runtime.signer, last, 2, 0, b"\x01" * size))
            last = _checked(node, packed[-1], last)
            node.logs.offer(packed[-1])
        await _push(node, packed)
    await _push(node, [make(node.run_id, node.runtime.signer, last, 2, 0, b"\x01" * size)])


async def _open_logs(node: OneByteNode) -> None:
    """Two hundred more logs, every time."""
    start = FAR - 200 * int(trio.current_time())
    await _push(
        node,
        [
            make(node.run_id, node.runtime.signer, None, start - number, 0, b"\x70\x71")
            for number in range(200)
        ],
    )


def _checked(node: OneByteNode, packed: bytes, before: Batch | None) -> Batch:
    return check(node.run_id, packed, parse(packed), before, node._rules, node.runtime.signer)


def _serve_other_bytes(node: OneByteNode) -> None:
    """What is asked for comes with one record changed, and the signature of what it was."""

    def after(honest: Callable[..., list[bytes]], *asked: Any) -> list[bytes]:
        return [_altered(packed) for packed in honest(*asked)]

    _instead(node.logs, "after", after)
    _instead(node.spread, "_push", lambda honest, *_: None)


def _altered(packed: bytes) -> bytes:
    message = parse(packed)
    return encode(replace(message, records=bytes([message.records[0] ^ 1]) + message.records[1:]))


# --- version vectors ------------------------------------------------------------------------------------------------


def _tell_of_what_is_not(node: OneByteNode) -> None:
    """A version vector from the future, in every heartbeat another one, and rows for logs that do not exist."""

    def beat(honest: Callable[[], Heartbeat]) -> Heartbeat:
        return replace(honest(), vector=node.runtime.rng.randbytes(32), records=FAR, state=b"")

    def rows(honest: Callable[[], bytes]) -> bytes:
        held = honest()
        row = b"\xff" * 15 + bytes([node.runtime.rng.randrange(256)]) + FAR.to_bytes(8, "big")
        return held + row + node.runtime.rng.randbytes(32) + b"\0"

    _instead(node, "_heartbeat", beat)
    _instead(node.logs, "rows", rows)


def _stall(node: OneByteNode) -> None:
    """Questions are taken, and answered by half."""

    async def answer(_: PeerId, stream: FlowStream) -> None:
        await receive_message(stream, WantHeads | WantBatches, bytes_max=node.limits.frame_bytes_max)
        await stream.send_all(b"\0\0\1\0 and so on")
        await trio.sleep_forever()

    def serve(honest: Callable[[], None]) -> None:
        node.runtime.transport.serve(LOG_SYNC_PROTOCOL, answer)

    _instead(node.spread.exchange, "serve", serve)


def _tell_of_another_state(node: OneByteNode) -> None:
    """Everybody's records and nobody's weights."""

    def beat(honest: Callable[[], Heartbeat]) -> Heartbeat:
        told = honest()
        return replace(told, state=bytes(32) if told.state else b"")

    _instead(node, "_heartbeat", beat)


# --- snapshots ------------------------------------------------------------------------------------------------------


def _vote_for_false_snapshots(node: OneByteNode) -> None:
    """The records that there are, and a state that they do not come to."""

    async def state_of(
        honest: Callable[[Settlement], Awaitable[bytes | None]], told: Settlement
    ) -> bytes | None:
        state = await honest(told)
        return None if state is None else bytes(len(state))

    _instead(node.keeper, "state_of", state_of)


def _vote_for_the_future(node: OneByteNode) -> None:
    """Records that nobody has, in the name of somebody who counts."""

    def settlement(honest: Callable[[], Settlement]) -> Settlement:
        logs = honest().logs
        return Settlement(logs=[replace(entry, number=FAR, end=10**6 + entry.end) for entry in logs])

    async def state_of(honest: Callable[[Settlement], Awaitable[bytes | None]], told: Settlement) -> bytes:
        return bytes(len(await honest(Settlement(logs=[])) or b"none"))

    _instead(node.keeper, "settlement", settlement)
    _instead(node.keeper, "state_of", state_of)


def _instead(part: object, method: str, lie: Callable[..., Any]) -> None:
    """Have ``lie(honest, ...)`` answer for ``part.method(...)``, where ``honest`` is what answered before."""
    setattr(part, method, partial(lie, getattr(part, method)))


RECORD_ATTACKERS: Mapping[str, RecordAttacker] = MappingProxyType(
    {
        "forger": RecordAttacker("batches of others that it signed", "signature", _again_and_again(_forge)),
        "replayer": RecordAttacker("old batches, over and over", "replay", _again_and_again(_replay)),
        "falling-clock": RecordAttacker(
            "logs whose clock falls", "clock-fell", _again_and_again(_let_the_clock_fall)
        ),
        "flying-clock": RecordAttacker(
            "a log from the end of time", "", _again_and_again(_let_the_clock_fly)
        ),
        "flood": RecordAttacker("more records than a log may have", "flood", _again_and_again(_flood)),
        "openings": RecordAttacker("logs without end", "openings", _again_and_again(_open_logs)),
        "other-bytes": RecordAttacker(
            "batches with a record changed, whenever it is asked", "signature", _serve_other_bytes
        ),
        "hollow-vector": RecordAttacker(
            "version vectors from the future that it cannot serve", "not-served", _tell_of_what_is_not
        ),
        "stall": RecordAttacker(
            "answers about logs that end in the middle and go on for ever", "stall", _stall
        ),
        "other-state": RecordAttacker(
            "other weights at the same records", "other-state", _tell_of_another_state
        ),
        "false-snapshots": RecordAttacker(
            "states that the records do not come to", "false-snapshot", _vote_for_false_snapshots
        ),
        "snapshots-of-nothing": RecordAttacker(
            "snapshots of a million records that nobody made", "", _vote_for_the_future
        ),
    }
)
"""All of them, by name."""
