"""27 kinds of garbage at a live node: it goes on training, keeps its peer, and counts what it refuses."""

from pathlib import Path

import pytest

from node.logs import short_peer
from node.status import NodeStatus
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.transport import PeerId, PeerRecord
from tests.p2p.garbage import GOSSAMER_PROTOCOLS, KINDS, Garbage, throw
from tests.process.swarm import small_swarm, until

PATIENCE_S = 5.0
"""The victim hangs up by itself, and much sooner unless it is short of a processor."""
COUNTED = {"empty stream": 0, "frame cut off": 1}
"""Kinds that are not refused once by each protocol that reads what a stranger says. A stream that ends early blames
nobody, except where a frame as long as the one it announced is never sent."""


def refusals_due(garbage: Garbage) -> int:
    """How often a node is to count one kind as malformed."""
    # Members are compared with those alone who have said that they follow the same run.
    return 0 if garbage.raw else COUNTED.get(garbage.name, len(GOSSAMER_PROTOCOLS) - 1)


async def throw_as_a_stranger(garbage: Garbage, victim: PeerRecord) -> None:
    """Throw one kind under a name of its own: a stranger already banned would not be listened to."""
    async with open_libp2p(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"]) as attacker:
        await throw(garbage, victim, attacker, patience_s=PATIENCE_S)


def has_a_peer(status: NodeStatus) -> bool:
    return any(peer.connected for peer in status.peers)


@pytest.mark.process
async def test_a_live_node_survives_all_kinds_of_garbage(tmp_path: Path) -> None:
    async with small_swarm(tmp_path, nodes=2, steps=1_000_000) as (victim, friend):
        before, friends = await until(
            [victim, friend],
            lambda statuses: all(s.mixes > 0 and has_a_peer(s) for s in statuses),
            seconds=60,
        )
        target = PeerRecord(PeerId(before.peer), (before.addresses[0].partition("/p2p/")[0],))
        told_before = len(victim.log_file.read_text())
        for garbage in KINDS:
            await throw_as_a_stranger(garbage, target)
            (now,) = await until([victim], lambda s, step=before.step: s[0].step > step, seconds=20)
            assert has_a_peer(now), garbage.name
            refused = now.refusals.get("malformed", 0) - before.refusals.get("malformed", 0)
            assert refused == refusals_due(garbage), garbage.name
            before = now
        (after,) = await until([victim], lambda s: s[0].mixes > before.mixes, seconds=20)

        assert set(after.refusals) == {"malformed"}
        assert after.problem == ""
        log = victim.log_file.read_text()[told_before:]
        assert "Traceback" not in log
        assert "[error" not in log
        assert not [
            line for line in log.splitlines() if "disconnected" in line and short_peer(friends.peer) in line
        ]
