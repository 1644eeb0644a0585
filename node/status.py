"""NodeStatus: one frozen snapshot of a node, the same for ``status``, ``--json``, the live view and tests."""

from __future__ import annotations

from typing import Literal

import msgspec

PHASES = ("starting", "joining", "training", "waiting", "merging", "finished", "stopping", "rendezvous")
"""What ``NodeStatus.phase`` may be. Joining and waiting are of one-byte mode, merging of gossip mode."""

MEMBER_STATES = ("alive", "suspect", "gone", "left", "banned")
"""What ``PeerStatus.state`` may be."""


class MixReport(msgspec.Struct, frozen=True, kw_only=True):
    """The last mix: which rule, with whom, and what it did to the weights' variance."""

    rule: str
    fragment: int
    peers: list[str]
    step: int
    variance_ratio_before: float
    """Variance of the plain mean over the mean variance of the models that went in (1.0 for alike models)."""
    variance_ratio_after: float
    """The same ratio after the rule has been applied."""


class MergeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The last committed global merge as this node knows it."""

    record: str
    """Hash of the committed merge record, hex."""
    height: int
    contributors: list[str]
    weights_hash: str
    """BLAKE3 of the anchor's fp32 little-endian weights, hex; equal wherever the record is equal."""
    contributed: bool
    """Whether this node's weights are in it."""
    loss_before: float | None
    """This node's held-out loss just before it took the anchor; None when it was not measured."""
    loss_merged: float | None
    """Held-out loss of the anchor itself."""
    duration_s: float


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """The weights of a merge on their way here: what a newcomer, or whoever was away, waits for."""

    received: int
    """Checked bytes, of ``total``."""
    total: int
    holders: list[str]
    """Who has sent parts of it."""


class RecordStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One-byte mode: what the weights hold, and who holds the same."""

    applied: int
    """Records that the weights hold, of everybody."""
    waiting: int
    """Records that are held and do not count yet."""
    unsent: int
    """Our own that are not in a batch yet."""
    duplicates: int
    """Batches that neighbours pushed although they were held. A few are normal; replays show in ``refusals`` too."""
    logs: int
    forked: int
    log: str
    """The name of the log that this node writes, hex."""
    vector: str
    """The digest of the version vector, hex: who reports the same holds the same records."""
    state: str | None
    """The state hash at that vector, hex; None while records are on the way into the weights."""
    agree: int
    """Members alive that report the same vector and the same state."""
    ceiling: float | None
    """How many peers like this one a peer could follow before applying records took as long as making them."""


class LogStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One log, as far as this node holds it."""

    log: str
    """Its name, hex."""
    author: str
    incarnation: int
    batches: int
    records: int
    """That count."""
    waiting: int
    """That are held and do not count yet."""
    clock: int
    """Of the last batch."""
    last: str
    """The name of the last batch, hex."""
    forked: bool


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What ``gossamer log verify`` found out."""

    batches: int
    """Held, and checked again."""
    records: int
    """In them, and taken back."""
    settled: int
    """Records of the snapshot that they go on from; 0: they go on from the base weights."""
    state: str
    """The state hash, hex."""
    counts_alike: bool
    """Whether the batches that are held, read anew, make the same records count."""
    comes_back: bool
    """Whether the weights without these records are those that they go on from, bit for bit."""
    damaged: list[str]
    """Files of records that are not what was written any more, below the folder of the run."""


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One member of the swarm as this node sees it."""

    peer: str
    state: str
    """One of MEMBER_STATES."""
    connected: bool
    relay: str | None = None
    """Who carries the connection, if it is not direct."""
    addresses: list[str]
    step: int
    loss: float | None
    heard_s_ago: float
    head_height: int
    standing: float
    last_problem: str
    bytes_pulled: int
    records: int | None = None
    """One-byte mode: records of this member that our weights hold."""
    behind: int | None = None
    """By how many records it said it holds less than we do; negative: more."""
    influence: float | None = None
    """Its part of all that records have moved our weights, 0 to 1."""
    agrees: bool | None = None
    """Whether it reports our vector with our state hash; None where its vector is another."""


class Foretold(msgspec.Struct, frozen=True, kw_only=True):
    """What a global merge would come to, on the same held-out data for all."""

    losses: dict[str, float]
    """Of each model that could be had, by peer."""
    local: float
    """Their mean."""
    merged: float
    """Of the average of all of them."""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a person or a program asks of a running node. ``schema`` changes when a field does."""

    schema: int = 1
    peer: str
    name: str
    version: str
    pid: int
    uptime_s: float
    addresses: list[str]
    reach: Literal["unknown", "public", "private"] = "unknown"
    """Whether others can dial this node, as far as neighbours could tell."""
    relays: list[str] = []
    """Through whom it is reached, where nobody can."""
    mapped: list[str] = []
    """Where the router says that it forwards to this node, asked by UPnP."""
    run_id: str
    run_name: str
    private: bool = False
    """Whether only who has the swarm's key can connect."""
    phase: str
    """One of PHASES. In a rendezvous all that is about a model is nothing."""
    problem: str
    """What stands in the way right now, with what to do about it; empty when nothing does."""
    device: str
    parameters: int
    step: int
    steps_total: int
    loss: float | None
    """Training loss, smoothed over about 20 steps, nats per ``unit``."""
    unit: str = "byte"
    """What is learned from, and what tokens are: byte, token or example."""
    tokens_per_s: float
    """Smoothed too; 0 while it does not train."""
    tokens: int
    mixes: int
    mixes_failed: int
    mixes_one_sided: int
    """Meetings after which the other may have stepped and this node has not."""
    last_mix: MixReport | None
    last_merge: MergeReport | None
    last_merge_s_ago: float | None = None
    """Since this process took its anchor; None for a merge that it remembers from an earlier life."""
    merges: int
    arrival: Arrival | None = None
    """None while no weights are on their way."""
    records: RecordStatus | None = None
    """None in gossip mode."""
    bytes_sent: int
    bytes_received: int
    bytes_sent_today: int = 0
    """Since 00:00 UTC, earlier processes included."""
    bytes_received_today: int = 0
    peers: list[PeerStatus]
    refusals: dict[str, int]
    """Counted, logged refusals by reason: malformed, signature, wrong-run, hash, non-finite, norm and so on."""
    checkpoint_step: int
    disk_bytes: int


def members_by_state(status: NodeStatus) -> dict[str, int]:
    """How many of the other members are in each of MEMBER_STATES."""
    counts = dict.fromkeys(MEMBER_STATES, 0)
    for peer in status.peers:
        counts[peer.state] += 1
    return counts
