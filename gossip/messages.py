"""Every message of the protocol, on one page: frozen structs, their bounds, and the stream each travels on.

Owns the wire format and nothing else. ``docs/PROTOCOL.md`` holds a table generated from this file. A struct's
bytes are its canonical CBOR (``p2p.codec``); bounds written here are checked while decoding, so code that
holds a message holds one within its bounds. Meaning (signatures, freshness, quorum) is checked by the parts
that use the messages.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from p2p.transport import ProtocolName

PROTOCOL_VERSION = 1

HELLO_PROTOCOL = ProtocolName("/gossamer/hello/1")
SYNC_PROTOCOL = ProtocolName("/gossamer/sync/1")
SHARD_PROTOCOL = ProtocolName("/gossamer/shard/1")
MERGE_PROTOCOL = ProtocolName("/gossamer/merge/1")

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""A BLAKE3-256 digest."""
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
PeerText = Annotated[str, Meta(min_length=40, max_length=64)]
Address = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Label = Annotated[str, Meta(max_length=64)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages: immutable, named fields, tagged with its type so that unions can be decoded."""


# --- identity of content ------------------------------------------------------------------------------------


class ShardRef(Message, frozen=True):
    """A shard by content: the root of its two-level BLAKE3 tree, and its size in bytes."""

    root: Hash
    size: Annotated[int, Meta(ge=1, le=1 << 30)]


# --- hello: the first exchange on every connection ------------------------------------------------------------


class Hello(Message, frozen=True):
    """Sent by the dialler on HELLO_PROTOCOL and answered with the other side's own Hello.

    Peers of different runs disconnect.
    """

    run: Hash
    version: Count
    agent: Label
    addresses: Annotated[list[Address], Meta(max_length=8)]


class WantSpec(Message, frozen=True):
    """Ask for the run spec whose canonical bytes hash to ``run``."""

    run: Hash


class SpecBytes(Message, frozen=True):
    """The canonical bytes of a run spec; the asker hashes them before believing them."""

    spec: Annotated[bytes, Meta(max_length=64 << 10)]


class WantPeers(Message, frozen=True):
    """Peer exchange: ask for up to ``count`` members' heartbeat notices, which carry signed addresses."""

    count: Annotated[int, Meta(ge=1, le=64)]


# --- notices: signed last-writer-wins registers ---------------------------------------------------------------


class Notice(Message, frozen=True):
    """The newest word of ``author`` on ``kind``; ordered by (incarnation, sequence); signed over all of it.

    The signature's purpose is ``gossamer/notice/1`` and its payload the canonical bytes of a NoticeClaim.
    """

    author: PeerText
    kind: Annotated[str, Meta(max_length=16)]
    incarnation: Count
    sequence: Count
    body: Annotated[bytes, Meta(max_length=12 << 10)]
    signature: Signature


class NoticeClaim(Message, frozen=True):
    """What a notice's signature covers: the notice itself without the signature, and the run it belongs to."""

    run: Hash
    author: PeerText
    kind: Annotated[str, Meta(max_length=16)]
    incarnation: Count
    sequence: Count
    body: Annotated[bytes, Meta(max_length=12 << 10)]


class Heartbeat(Message, frozen=True):
    """Body of kind ``heartbeat``: a member is here, where it can be reached, and how far it is."""

    addresses: Annotated[list[Address], Meta(max_length=8)]
    agent: Label
    step: Count
    """Inner steps taken since the run began."""
    steps_total: Count
    """Inner steps this member will take before the final merge."""
    steps_per_s: Annotated[float, Meta(ge=0, le=1e9)]
    tokens: Count
    loss: Annotated[float, Meta(ge=0, le=1e9)]
    """Smoothed training loss in nats per byte; 0 before the first step."""
    head: Hash
    """The last merge record this member holds as committed."""
    head_height: Count
    head_participants: Count
    """Participants accumulated over the whole branch: which branch wins when two meet."""
    leaving: bool
    """A goodbye: the member is shutting down on purpose."""


class FragmentEntry(Message, frozen=True):
    """A published snapshot of one fragment of the author's live weights."""

    fragment: Count
    step: Count
    shard: ShardRef


class Fragments(Message, frozen=True):
    """Body of kind ``fragments``: the newest published snapshot of each fragment, by ascending fragment."""

    entries: Annotated[list[FragmentEntry], Meta(max_length=128)]


class Probe(Message, frozen=True):
    """Open a reconciliation: the digest of my whole notice table."""

    digest: Hash


class InStep(Message, frozen=True):
    """Our tables are equal; nothing to do."""


class Version(Message, frozen=True):
    """The version of one register that the sender holds."""

    author: PeerText
    kind: Annotated[str, Meta(max_length=16)]
    incarnation: Count
    sequence: Count


class Versions(Message, frozen=True):
    """Our tables differ; this is what mine holds."""

    versions: Annotated[list[Version], Meta(max_length=8192)]


class Swap(Message, frozen=True):
    """Here is what you lack; send me these in return."""

    notices: Annotated[list[Notice], Meta(max_length=256)]
    want: Annotated[list[Version], Meta(max_length=256)]


class Notices(Message, frozen=True):
    """The notices that were asked for, as far as they are held and fit."""

    notices: Annotated[list[Notice], Meta(max_length=256)]


# --- shards: pulled by content, in chunks --------------------------------------------------------------------


class WantOutline(Message, frozen=True):
    """Ask for the chunk hashes of a shard."""

    shard: ShardRef


class Outline(Message, frozen=True):
    """The chunk hashes, which must hash to the shard's root."""

    chunks: Annotated[list[Hash], Meta(max_length=1024)]


class WantChunk(Message, frozen=True):
    """Ask for one chunk; the reply is a ChunkFollows frame and then that many raw bytes."""

    shard: ShardRef
    index: Count


class ChunkFollows(Message, frozen=True):
    """``size`` raw bytes follow on the stream, outside any frame."""

    size: Annotated[int, Meta(ge=1, le=1 << 20)]


class NotHeld(Message, frozen=True):
    """This node does not hold the shard, or no longer."""


# --- refusals --------------------------------------------------------------------------------------------------


class Refusal(Message, frozen=True):
    """The request was understood and declined; ``code`` is for machines, ``text`` for people."""

    code: Label
    text: Annotated[str, Meta(max_length=512)]


# --- merges: one link of the chain at a time ------------------------------------------------------------------
