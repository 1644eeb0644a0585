"""Standings fall by what happened, recover with time, and bans end."""

from __future__ import annotations

import pytest
import trio

from gossip.ledger import BAN_S, COSTS, HALF_LIFE_S, NOT_ALLOWED, PEERS_MAX, STANDING_MAX, PeerLedger
from p2p.transport import PeerId

PEER = PeerId("peer")


async def test_offences_cost_by_reason_and_are_counted(autojump_clock):
    ledger = PeerLedger()
    ledger.note(PEER, "hash", "chunk 3 does not match its hash")
    ledger.note(PEER, "stall")
    assert ledger.standing(PEER) == pytest.approx(STANDING_MAX - COSTS["hash"] - COSTS["stall"])
    assert ledger.refusals == {"hash": 1, "stall": 1}
    assert ledger.last_problem(PEER) == "stall"
    assert ledger.standing(PeerId("other")) == STANDING_MAX
    assert ledger.last_problem(PeerId("other")) == ""


async def test_lost_points_come_back_by_half(autojump_clock):
    ledger = PeerLedger()
    ledger.note(PEER, "hash")
    await trio.sleep(HALF_LIFE_S)
    assert ledger.standing(PEER) == pytest.approx(STANDING_MAX - COSTS["hash"] / 2)


async def test_a_ban_is_announced_once_and_served(autojump_clock):
    ledger, banned = PeerLedger(), []
    ledger.on_ban(lambda peer, problem: banned.append((peer, problem)))
    for _ in range(5):
        ledger.note(PEER, "malformed", "garbage")
    assert banned == [(PEER, "malformed: garbage")]
    assert ledger.banned(PEER)
    assert ledger.standing(PEER) == 0.0
    await trio.sleep(BAN_S)
    assert not ledger.banned(PEER)
    assert ledger.standing(PEER) == pytest.approx(STANDING_MAX / 2)


async def test_occasional_trouble_never_bans(autojump_clock):
    ledger = PeerLedger()
    for _ in range(100):
        ledger.note(PEER, "stall")
        await trio.sleep(60)
    assert not ledger.banned(PEER)


async def test_who_is_not_on_an_allow_list_is_as_if_banned(autojump_clock):
    ledger, stranger = PeerLedger([PEER]), PeerId("stranger")
    assert (ledger.banned(PEER), ledger.last_problem(PEER)) == (False, "")
    assert (ledger.banned(stranger), ledger.last_problem(stranger)) == (True, NOT_ALLOWED)
    for _ in range(5):
        ledger.note(PEER, "malformed")
    assert ledger.banned(PEER)
    assert "malformed" in ledger.last_problem(PEER)


async def test_memory_is_bounded_and_keeps_the_worst(autojump_clock):
    ledger = PeerLedger()
    ledger.note(PEER, "hash")
    for number in range(PEERS_MAX + 10):
        ledger.note(PeerId(f"stranger {number}"), "broken")
    assert len(ledger._accounts) == PEERS_MAX
    assert ledger.standing(PEER) < STANDING_MAX / 2 + 1
