"""Every message of the protocol, on one page: frozen structs, their bounds, and the stream each travels on.

Owns the wire format and nothing else. ``docs/PROTOCOL.md`` holds a table generated from this file. A struct's
bytes are its canonical CBOR (``p2p.codec``); bounds written here are checked while decoding, so code that
holds a message holds one within its bounds. Meaning (signatures, freshness, quorum) is checked by the parts
that use the messages.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from p2p.codec import WireMessage
from p2p.transport import ProtocolName

PROTOCOL_VERSION = 1
VERSIONS_APART_MAX = 1
"""Between neighbours: a swarm is updated node by node, and the newer of two speaks as the older does."""

HELLO_PROTOCOL = ProtocolName("/gossamer/hello/1")
SYNC_PROTOCOL = ProtocolName("/gossamer/sync/1")
SHARD_PROTOCOL = ProtocolName("/gossamer/shard/1")
SNAPSHOT_PROTOCOL = ProtocolName("/gossamer/snapshot/1")
PAIR_PROTOCOL = ProtocolName("/gossamer/pair/1")
MERGE_PROTOCOL = ProtocolName("/gossamer/merge/1")
LOG_PROTOCOL = ProtocolName("/gossamer/log/1")
LOG_SYNC_PROTOCOL = ProtocolName("/gossamer/log-sync/1")
DHT_PROTOCOL = ProtocolName("/gossamer/dht/1")
REACH_PROTOCOL = ProtocolName("/gossamer/reach/1")
ADVERTS_PROTOCOL = ProtocolName("/gossamer/adverts/1")

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""A BLAKE3-256 digest."""
Digest = Annotated[bytes, Meta(max_length=32)]
"""A BLAKE3-256 digest, or nothing."""
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
PeerText = Annotated[str, Meta(min_length=40, max_length=64)]
Address = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Label = Annotated[str, Meta(max_length=64)]
Kind = Annotated[str, Meta(min_length=1, max_length=16)]
"""The name of a register; NOTICE_BODIES lists those in use."""

NOTICE_BODY_BYTES_MAX = 12 << 10
NoticeBody = Annotated[bytes, Meta(max_length=NOTICE_BODY_BYTES_MAX)]

CHUNK_BYTES = 1 << 20
"""Shards are cut every CHUNK_BYTES. Part of the format, not a limit: another value gives other roots."""


class Message(WireMessage, frozen=True):
    """Base of all messages."""


# --- identity of content ------------------------------------------------------------------------------------


class ShardRef(Message, frozen=True):
    """A shard by content: its size in bytes, and the BLAKE3 digest of the canonical bytes of its Outline."""

    root: Hash
    size: Annotated[int, Meta(ge=1, le=1 << 30)]


# --- hello: the first exchange on every connection ------------------------------------------------------------


class Hello(Message, frozen=True):
    """Each side calls the other with it on a new connection; the reply is the other's Hello, or a refusal.

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
    """Peer exchange: ask for up to ``count`` members' heartbeat notices, which carry signed addresses.

    The reply is a Notices message.
    """

    count: Annotated[int, Meta(ge=1, le=64)]


# --- reachability: whether others can dial a peer ---------------------------------------------------------------


class WantDialBack(Message, frozen=True):
    """Ask a connected peer to dial the asker where its packets come from, at the ports of these addresses."""

    addresses: Annotated[list[Address], Meta(min_length=1, max_length=8)]


class DialBack(Message, frozen=True):
    """Where the asker's packets come from, and at which addresses of that host it answered."""

    host: Annotated[str, Meta(min_length=2, max_length=64)]
    answered: Annotated[list[Address], Meta(max_length=8)]


# --- notices: signed last-writer-wins registers ---------------------------------------------------------------


class Notice(Message, frozen=True):
    """The newest word of ``author`` on ``kind``; ordered by (incarnation, sequence); signed over all of it.

    The signature's purpose is ``gossamer/notice/1`` and its payload the canonical bytes of a NoticeClaim.
    """

    author: PeerText
    kind: Kind
    incarnation: Count
    sequence: Count
    body: NoticeBody
    signature: Signature


class NoticeClaim(Message, frozen=True):
    """What a notice's signature covers: the notice itself without the signature, and the run it belongs to."""

    run: Hash
    author: PeerText
    kind: Kind
    incarnation: Count
    sequence: Count
    body: NoticeBody


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
    records: Count
    """One-byte mode: records that count here; else 0."""
    vector: Digest
    """The digest of the version vector (Heads) that goes with ``records``; empty in gossip mode."""
    state: Digest
    """The state hash at that vector; empty where it was not worked out."""


class RecordSnapshot(Message, frozen=True):
    """The state that some records come to."""

    records: Count
    settlement: ShardRef
    """The canonical bytes of a Settlement: which records."""
    state: ShardRef
    """All states, sorted by tensor name, int32 little-endian."""


class SnapshotVote(Message, frozen=True):
    """Body of kind ``snapshot``: this member has come to that snapshot by itself."""

    snapshot: RecordSnapshot
    certificate: ShardRef | None
    """The canonical bytes of the Certificate of the latest snapshot that it relies on."""


PACKED_NOTICE_BYTES_MAX = 16 << 10
PackedNotice = Annotated[bytes, Meta(max_length=PACKED_NOTICE_BYTES_MAX)]
"""The canonical bytes of a Notice: they are passed on as they came."""


class Certificate(Message, frozen=True):
    """Votes for one snapshot, by different members: as many as the run asks for."""

    votes: Annotated[list[PackedNotice], Meta(max_length=1024)]


NOTICE_BODIES: dict[str, type[Message]] = {"heartbeat": Heartbeat, "snapshot": SnapshotVote}
"""Every kind of notice and the message its body holds; other kinds are refused."""


REGISTER_KEY_BYTES = 16
REGISTER_STAMP_BYTES = 24


class Versions(Message, frozen=True):
    """Open a reconciliation; this is what my table holds: of each register its key and its stamp, ascending by key.

    A key is the first 16 bytes of the BLAKE3 digest of ``author || 0x00 || kind``. A stamp is the incarnation and the
    sequence number, each 8 bytes big-endian, and the first 8 bytes of the signature: the greater one wins, so even an
    author that signs two notices under one number leaves every table equal.
    """

    registers: Annotated[bytes, Meta(max_length=8192 * (REGISTER_KEY_BYTES + REGISTER_STAMP_BYTES))]


class Swap(Message, frozen=True):
    """Here is what you lack; send me the registers of these keys in return, unless there are none."""

    notices: Annotated[list[PackedNotice], Meta(max_length=256)]
    want: Annotated[bytes, Meta(max_length=256 * REGISTER_KEY_BYTES)]


class Notices(Message, frozen=True):
    """The notices that were asked for, as far as they are held and fit."""

    notices: Annotated[list[PackedNotice], Meta(max_length=256)]


# --- the hash table: who takes part in a run, asked of nodes of any run ---------------------------------------


DHT_BUCKET_MAX = 8
"""k: contacts in one bucket of a routing table, peers named in one answer, holders of one record."""
DHT_RECORDS_TOLD_MAX = 16

DhtAddresses = Annotated[list[Address], Meta(min_length=1, max_length=8)]


class DhtContact(Message, frozen=True):
    """A node of the hash table, and where it can be dialled."""

    peer: PeerText
    addresses: DhtAddresses


class ProviderRecord(Message, frozen=True):
    """``peer`` takes part in the run that ``key`` stands for, and can be dialled there until the record expires.

    The signature's purpose is ``gossamer/provider/1`` and its payload the canonical bytes of a ProviderClaim.
    """

    key: Hash
    peer: PeerText
    addresses: DhtAddresses
    expires_unix_s: Count
    signature: Signature


class ProviderClaim(Message, frozen=True):
    """What the signature of a ProviderRecord covers: all the rest of it."""

    key: Hash
    peer: PeerText
    addresses: DhtAddresses
    expires_unix_s: Count


class Find(Message, frozen=True):
    """Ask for the records of ``key``, and for contacts closer to it. Answered by Found."""

    key: Hash
    addresses: Annotated[list[Address], Meta(max_length=8)]
    """Where the asker answers such questions itself; none if it does not."""


class Found(Message, frozen=True):
    """Some of the records that are held, and of the contacts known those closest to the key."""

    records: Annotated[list[ProviderRecord], Meta(max_length=DHT_RECORDS_TOLD_MAX)]
    closer: Annotated[list[DhtContact], Meta(max_length=DHT_BUCKET_MAX)]


class Provide(Message, frozen=True):
    """Hold this record, which is the sender's own. Answered by Noted."""

    record: ProviderRecord


# --- adverts: which swarms there are, asked of nodes of any run -----------------------------------------------


ADVERTS_TOLD_MAX = 256
ADVERT_BYTES_MAX = 4608
"""More than an advert takes that is within its bounds, and whose addresses can be dialled."""
PackedAdvert = Annotated[bytes, Meta(min_length=1, max_length=ADVERT_BYTES_MAX)]
"""A line of a list of swarms, as text in UTF-8."""


class WantAdverts(Message, frozen=True):
    """Ask which swarms a peer knows of that anybody may join. Answered by Adverts."""

    count: Annotated[int, Meta(ge=1, le=ADVERTS_TOLD_MAX)]


class Adverts(Message, frozen=True):
    """The peer's own advert first, if it has one, then some at random of those it holds, as far as they fit."""

    adverts: Annotated[list[PackedAdvert], Meta(max_length=ADVERTS_TOLD_MAX)]


# --- records: one-byte mode, what peers learned as signed, hash-chained batches -----------------------------------


RECORDS_PER_BATCH_MAX = 4096
Records = Annotated[bytes, Meta(min_length=1, max_length=RECORDS_PER_BATCH_MAX)]
"""One byte each (``training.byte_code``), in the order of their sequence numbers."""

PACKED_BATCH_BYTES_MAX = RECORDS_PER_BATCH_MAX + 512


class FirstBatch(Message, frozen=True):
    """Opens a log: its author's, in this incarnation of it. Records have sequence numbers from 0 on.

    The signature's purpose is ``gossamer/batch/1`` and its payload the canonical bytes of a FirstBatchClaim, whose
    BLAKE3 digest is the name of the batch.
    """

    author: PeerText
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    """Random: an author without its own synced head opens another log, and never forks one."""
    clock: Count
    """Records that the author had applied when it made the last of these."""
    records: Records
    signature: Signature


class NextBatch(Message, frozen=True):
    """Goes on where ``previous`` ended, by the same author; the payload of its signature is a NextBatchClaim."""

    previous: Hash
    clock: Count
    records: Records
    signature: Signature


class FirstBatchClaim(Message, frozen=True):
    """What the signature of a FirstBatch covers, and what it is named by."""

    run: Hash
    author: PeerText
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    clock: Count
    records: Records


class NextBatchClaim(Message, frozen=True):
    """What the signature of a NextBatch covers, and what it is named by."""

    run: Hash
    previous: Hash
    clock: Count
    records: Records


PackedBatch = Annotated[bytes, Meta(min_length=1, max_length=PACKED_BATCH_BYTES_MAX)]
"""The canonical bytes of a FirstBatch or a NextBatch: they are passed on as they came."""

LOG_NAME_BYTES = 16
BATCHES_PER_MESSAGE_MAX = 1024
LOGS_MAX = 1 << 14
"""Logs ever opened in a run: their heads fit into one message."""

LogName = Annotated[bytes, Meta(min_length=LOG_NAME_BYTES, max_length=LOG_NAME_BYTES)]
LogNames = Annotated[bytes, Meta(min_length=LOG_NAME_BYTES, max_length=64 * LOG_NAME_BYTES)]
"""One or more, one after the other."""


class Push(Message, frozen=True):
    """Batches that are news to the sender, each after the one before it in its log. Travels on a stream that stays."""

    batches: Annotated[list[PackedBatch], Meta(min_length=1, max_length=BATCHES_PER_MESSAGE_MAX)]


class Quiet(Message, frozen=True):
    """Others bring me these logs sooner: do not push them to me any more."""

    logs: LogNames


class Loud(Message, frozen=True):
    """Push these logs to me again."""

    logs: LogNames


class Compare(Message, frozen=True):
    """I have heard more than what I pushed: ask me, unless you know a version vector of this digest."""

    digest: Hash


class WantHeads(Message, frozen=True):
    """Ask how far each log goes; ``digest`` is that of the asker's own answer."""

    digest: Hash


HEAD_ROW_BYTES = LOG_NAME_BYTES + 8 + 32 + 1


class Heads(Message, frozen=True):
    """A version vector, or nothing if its BLAKE3 digest is the one that was named.

    A row for each log, ascending: its name; its batches, 8 bytes big-endian; the name of the last one, zeros when
    there is none; 1 if the log is forked there, else 0.
    """

    rows: Annotated[bytes, Meta(max_length=LOGS_MAX * HEAD_ROW_BYTES)]


class WantBatches(Message, frozen=True):
    """Ask for what goes on, in one log, from the last batch of it among ``names``; for all of it if none is held."""

    log: LogName
    names: Annotated[list[Hash], Meta(max_length=64)]


class Batches(Message, frozen=True):
    """What was asked for, in order, as much as fits. Where the log is forked, the proof comes last: two batches."""

    batches: Annotated[list[PackedBatch], Meta(max_length=BATCHES_PER_MESSAGE_MAX)]


class SettledLog(Message, frozen=True):
    """One log, as far as a snapshot holds it: batches and records up to its last batch, and what the next one needs."""

    author: PeerText
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    number: Annotated[int, Meta(ge=1, le=2**53)]
    end: Count
    clock: Count
    """Of the last batch."""
    name: Hash


class Settlement(Message, frozen=True):
    """Which records a snapshot holds: every log of which it holds any, ascending by author and incarnation."""

    logs: Annotated[list[SettledLog], Meta(max_length=LOGS_MAX)]


# --- shards: pulled by content, in chunks --------------------------------------------------------------------


class WantOutline(Message, frozen=True):
    """Ask for the chunk hashes of a shard."""

    shard: ShardRef


class Outline(Message, frozen=True):
    """A shard's size and the BLAKE3 digest of each of its chunks; its own digest is the shard's root."""

    size: Annotated[int, Meta(ge=1, le=1 << 30)]
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


# --- snapshots: a fragment of somebody's live weights ---------------------------------------------------------


class WantSnapshot(Message, frozen=True):
    """Ask a member to take a snapshot of one fragment of its live weights, or to share one it has just taken."""

    fragment: Count


class Snapshot(Message, frozen=True):
    """A snapshot by content: its bytes are pulled as a shard, which is kept for the asker until it asks again."""

    shard: ShardRef


# --- pairs: two members meet half-way ---------------------------------------------------------------------------


class PairOffer(Message, frozen=True):
    """Ask a member to meet. Answered by PairAccept or PairBusy."""

    shard: ShardRef
    """What the asker brings: where its outer step began, and where its inner steps led."""


class PairAccept(Message, frozen=True):
    """The member will meet, and brings this. It pulls the asker's shard from now on."""

    shard: ShardRef


class PairBusy(Message, frozen=True):
    """Not now: the member is meeting somebody, or has only just met."""


class PairClaim(Message, frozen=True):
    """What a receipt's signature covers."""

    run: Hash
    brought: ShardRef
    """By the author."""
    held: ShardRef
    """What the other brought."""


class PairReceipt(Message, frozen=True):
    """Its author holds what the other brought, and steps once it has the other's receipt. Answered by the other's.

    Purpose ``gossamer/pair-receipt/1``, payload a PairClaim.
    """

    claim: PairClaim
    signature: Signature


PairRequest = PairOffer | PairReceipt
"""What may be asked on PAIR_PROTOCOL."""
PairReply = PairAccept | PairBusy | PairReceipt
"""What may be answered there."""


# --- merges: one link of the chain at a time ------------------------------------------------------------------


class Ballot(Message, frozen=True, order=True):
    """One try at deciding one link of the chain; ordered by attempt, then by proposer."""

    attempt: Annotated[int, Meta(ge=0, le=2**40)]
    proposer: PeerText


class Contribution(Message, frozen=True):
    """What one member puts into a merge: an integer weight and one input shard for each piece that moves."""

    peer: PeerText
    weight: Annotated[int, Meta(ge=1, le=2**40)]
    moved: Annotated[list[Count], Meta(min_length=1, max_length=1024)]
    """Ascending: the pieces."""
    inputs: Annotated[list[ShardRef], Meta(min_length=1, max_length=1024)]
    """Theirs, in order."""


class SignedContribution(Contribution, frozen=True):
    """A contribution as it travels. Purpose ``gossamer/contribution/1``, payload a ContributionClaim."""

    signature: Signature


class ContributionClaim(Message, frozen=True):
    """What a contribution's signature covers: the contribution, and the one link it is meant for."""

    run: Hash
    parent: Hash
    contribution: Contribution


class RosterEntry(Message, frozen=True):
    """A member with a voice in the next link, and the height of its last contribution (0: none yet)."""

    peer: PeerText
    last_height: Count


class MergeRecord(Message, frozen=True):
    """One link of the chain: who was averaged and what came out. Its hash is BLAKE3 over its canonical bytes."""

    run: Hash
    parent: Hash
    """Hash of the record before, or of the run's genesis."""
    height: Annotated[int, Meta(ge=1, le=2**53)]
    point: Count
    """Scheduled merge points passed once this record is committed; never falls along the chain."""
    ballot: Ballot
    """The ballot under which the record was first proposed."""
    contributors: Annotated[list[SignedContribution], Meta(min_length=1, max_length=1024)]
    """Sorted by peer: the order of summation."""
    results: Annotated[list[ShardRef], Meta(min_length=1, max_length=1024)]
    """What all adopt, piece by piece: averaged weights, or the state that an update leads to."""
    moved: Annotated[list[Count], Meta(min_length=1, max_length=1024)]
    """Ascending: the pieces that were averaged. The results of all others are the parent's."""
    updates: Annotated[list[ShardRef], Meta(max_length=1024)]
    """What leads from the parent's results of those pieces to these; empty where the results themselves travel."""
    roster: Annotated[list[RosterEntry], Meta(min_length=1, max_length=1024)]
    """Sorted by peer: whose acknowledgements count for the next link."""
    absent: Annotated[list[PeerText], Meta(max_length=1024)]
    """Sorted: members of the parent's roster that do not count for this link, unheard for 3 merge periods."""
    participants_total: Count
    """Contributors of this and all earlier records."""


class Acknowledgement(Message, frozen=True):
    """``peer`` holds every result of a record and has accepted it, durably.

    Purpose ``gossamer/merge-acknowledgement/1``, payload an AcknowledgementClaim.
    """

    peer: PeerText
    signature: Signature


class AcknowledgementClaim(Message, frozen=True):
    """What an acknowledgement's signature covers."""

    run: Hash
    record: Hash
    ballot: Ballot


class CommittedRecord(Message, frozen=True):
    """A record and the acknowledgements of a quorum, all under one ballot: proof that the link is decided."""

    record: MergeRecord
    ballot: Ballot
    acknowledgements: Annotated[list[Acknowledgement], Meta(min_length=1, max_length=1024)]
    """Sorted by peer."""


class MergeCall(Message, frozen=True):
    """A proposer asks for a promise and a contribution. Answered by MergeOffer, Outbid or Elsewhere."""

    parent: Hash
    height: Annotated[int, Meta(ge=1, le=2**53)]
    point: Count
    ballot: Ballot
    absent: Annotated[list[PeerText], Meta(max_length=1024)]


class AcceptedRecord(Message, frozen=True):
    """The record that a member has accepted for a link, and under which ballot."""

    ballot: Ballot
    record: MergeRecord


class MergeOffer(Message, frozen=True):
    """A durable promise to accept nothing under a lower ballot, and what the member brings along."""

    contribution: SignedContribution | None
    accepted: AcceptedRecord | None


class Outbid(Message, frozen=True):
    """Refused: the member has promised a higher ballot for this link."""

    ballot: Ballot


class Elsewhere(Message, frozen=True):
    """Refused: the member's chain ends in another record than the proposer's."""

    head: Hash
    height: Count
    participants: Count


class MergePlan(Message, frozen=True):
    """Who is to be averaged. Each owner sums its pieces and answers MergeResults within ``timeout_s``."""

    parent: Hash
    ballot: Ballot
    contributors: Annotated[list[SignedContribution], Meta(min_length=1, max_length=1024)]
    timeout_s: Annotated[float, Meta(gt=0, le=3600)]


class PieceResult(Message, frozen=True):
    """The average of one piece, as its owner computed it."""

    piece: Count
    shard: ShardRef
    update: ShardRef | None
    """What leads from the parent's result to this one; None where this one itself travels."""


class MergeResults(Message, frozen=True):
    """What an owner summed, and whose inputs it could not get or had to refuse."""

    results: Annotated[list[PieceResult], Meta(max_length=1024)]
    missing: Annotated[list[PeerText], Meta(max_length=1024)]


class MergeAccept(Message, frozen=True):
    """A proposer asks for the acceptance of a record. Answered by Acknowledgement, Outbid or Elsewhere."""

    ballot: Ballot
    record: MergeRecord
    holders: Annotated[list[PeerText], Meta(max_length=16)]
    """Members known to hold all results, besides the owners and the proposer."""
    disputed: Annotated[list[Count], Meta(max_length=1024)]
    """Pieces whose owners disagreed: to be recomputed from the inputs, not fetched."""
    timeout_s: Annotated[float, Meta(gt=0, le=3600)]


class MergeOutlook(Message, frozen=True):
    """A proposer is looking at the results of a record and will ask for its acceptance if they are in order.

    Who hears it brings them here meanwhile. Binds nobody. Answered by Noted, Outbid or Elsewhere.
    """

    ballot: Ballot
    record: MergeRecord
    timeout_s: Annotated[float, Meta(gt=0, le=3600)]


class MergeCommit(Message, frozen=True):
    """A link is decided. Answered by Noted."""

    committed: CommittedRecord


class Noted(Message, frozen=True):
    """Received."""


class WantRecord(Message, frozen=True):
    """Ask for a committed record by hash. Answered by CommittedRecord or RecordNotHeld."""

    record: Hash


class RecordNotHeld(Message, frozen=True):
    """This member does not hold the record, or no longer."""


MergeRequest = MergeCall | MergePlan | MergeOutlook | MergeAccept | MergeCommit | WantRecord
"""What may be asked on MERGE_PROTOCOL."""

MergeReply = (
    MergeOffer | Outbid | Elsewhere | MergeResults | Acknowledgement | Noted | CommittedRecord | RecordNotHeld
)
"""What may be answered there."""
