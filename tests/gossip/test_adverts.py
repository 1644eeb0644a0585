"""Adverts of swarms: which are held, who gives way, and how they travel from one node to another."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable

import msgspec
import pytest
import trio
from trio.testing import MockClock

from gossip.advert_table import (
    ADVERT_S,
    ADVERTS_HELD_MAX,
    ADVERTS_PER_GIVER_MAX,
    ADVERTS_PER_RUN_MAX,
    TOLD_BYTES_MAX,
    AdvertTable,
    giver_of,
)
from gossip.adverts import ASK_S, FIRST_ASK_S, RENEW_S, AdvertExchange, fetch_adverts
from gossip.ledger import STANDING_MAX, PeerLedger
from gossip.messages import ADVERT_BYTES_MAX, ADVERTS_PROTOCOL, ADVERTS_TOLD_MAX, Adverts, WantAdverts
from gossip.visits import Visits
from netsim.network import SimHost, address_of, open_sim_network
from p2p.advert import ABOUT_CHARS_MAX, ADDRESSES_MAX, Advert, AdvertRefused, Claim, sign_advert
from p2p.errors import MalformedMessage
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS
from p2p.rpc import serve_calls
from p2p.service import open_service_nursery
from p2p.transport import PeerRecord
from tests.gossip.world import IDENTITIES

ALICE, BOB, CAROL = IDENTITIES[:3]
NOW_S = 1_700_000_000.0
LOCAL = Identity.generate()


def advert_of(run: int = 0, signer: Identity = ALICE, expires_s: float = ADVERT_S, **more: object) -> Advert:
    fields = {
        "name": f"run-{run}",
        "about": "",
        "run": f"{run:064x}",
        "parameters": 1,
        "addresses": [f"{address_of(signer.peer)}/p2p/{signer.peer}"],
        "expires_unix_s": int(NOW_S + expires_s),
    }
    return sign_advert(signer, Claim(**fields | more))  # type: ignore[arg-type]


def line_of(*given: object, **more: object) -> bytes:
    return advert_of(*given, **more).line().encode()  # type: ignore[arg-type]


def new_table() -> AdvertTable:
    return AdvertTable(signer=LOCAL, limits=DEFAULT_LIMITS, rng=random.Random(1))


def put(table: AdvertTable, line: bytes, giver: str = "a", *, now_s: float = NOW_S) -> None:
    table.put(line, giver, now_unix_s=now_s)


def told(table: AdvertTable, count: int = ADVERTS_TOLD_MAX, *, now_s: float = NOW_S) -> set[bytes]:
    return set(table.told(None, count, now_unix_s=now_s))


def test_of_one_peer_for_one_run_the_latest_stands_until_it_expires() -> None:
    table = new_table()
    for expires_s in (60, 90, 30):
        put(table, line_of(expires_s=expires_s))
    put(table, line_of(signer=BOB, expires_s=50))
    assert told(table) == {line_of(expires_s=90), line_of(signer=BOB, expires_s=50)}
    assert told(table, now_s=NOW_S + 50) == {line_of(expires_s=90)}
    assert told(table, now_s=NOW_S + 90) == set()
    assert len(table) == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense", "malformed"),
        (line_of().replace(b"run-0", b"run-1"), "signature"),
        (line_of().replace(ALICE.peer.encode(), BOB.peer.encode()), "signature"),
        (line_of(expires_s=0), "expired"),
        (line_of(expires_s=ADVERT_S + 3600), "expired"),
        (line_of(addresses=[f"/ip4/0.0.0.0/tcp/4100/p2p/{ALICE.peer}"]), "malformed"),
        (line_of(addresses=[f"/ip4/45.1.0.7/tcp/4100/p2p/{'Q' * 46}"]), "malformed"),
    ],
)
def test_what_does_not_hold_is_not_held(line: bytes, reason: str) -> None:
    table = new_table()
    with pytest.raises(AdvertRefused) as refused:
        put(table, line)
    assert (refused.value.reason, len(table)) == (reason, 0)


def test_our_own_of_an_earlier_life_is_not_held() -> None:
    table = new_table()
    put(table, line_of(signer=LOCAL))
    assert len(table) == 0


def test_one_giver_fills_a_quarter_and_many_make_room_for_others() -> None:
    table = new_table()
    for run in range(ADVERTS_PER_GIVER_MAX + 5):
        put(table, line_of(run), "flood")
    assert len(table) == ADVERTS_PER_GIVER_MAX
    # A newer one of what is held is taken all the same, and stays counted where it was.
    put(table, line_of(0, expires_s=ADVERT_S + 60), "honest")
    put(table, line_of(999), "flood")
    assert line_of(0, expires_s=ADVERT_S + 60) in told(table)
    assert len(table) == ADVERTS_PER_GIVER_MAX
    for run in range(1000, 1000 + ADVERTS_HELD_MAX):
        put(table, line_of(run), f"flood-{run % 3}")
    assert len(table) == ADVERTS_HELD_MAX
    for run in range(2000, 2020):
        put(table, line_of(run), "honest")
    assert len(table) == ADVERTS_HELD_MAX
    assert {line_of(run) for run in range(2000, 2020)} < told(table)


def test_of_one_run_a_few_are_held_of_as_many_givers_as_there_are() -> None:
    table = new_table()
    signers = [Identity.generate() for _ in range(ADVERTS_PER_RUN_MAX + 5)]
    liars, honest = signers[: ADVERTS_PER_RUN_MAX + 2], signers[ADVERTS_PER_RUN_MAX + 2 :]
    for signer in liars:
        put(table, line_of(signer=signer), "liar")
    for number, signer in enumerate(honest):
        put(table, line_of(signer=signer), f"giver-{number}")
    assert len(table) == ADVERTS_PER_RUN_MAX
    assert {line_of(signer=signer) for signer in honest} < told(table)


def test_an_answer_begins_with_ones_own_and_has_a_bound() -> None:
    table = new_table()
    # The largest there is: whatever may be in it takes as many bytes as it can.
    where = f"/ip6/{'1111:' * 7}1111/tcp/41000/p2p/{BOB.peer}/p2p-circuit/p2p/{ALICE.peer}"
    large = {"about": "\x01" * ABOUT_CHARS_MAX, "addresses": [where] * ADDRESSES_MAX, "parameters": 2**53}
    for run in range(ADVERTS_HELD_MAX):
        put(table, line_of(run, name=f"{run:048}", **large), f"{run % 8}")
    own = line_of(signer=LOCAL)
    assert table.told(advert_of(signer=LOCAL), 1, now_unix_s=NOW_S) == [own]
    few = [table.told(advert_of(signer=LOCAL), 4, now_unix_s=NOW_S) for _ in range(2)]
    assert [len(lines) for lines in few] == [4, 4]
    assert few[0][1:] != few[1][1:]
    lines = table.told(advert_of(signer=LOCAL), ADVERTS_TOLD_MAX, now_unix_s=NOW_S)
    assert lines[0] == own
    assert max(map(len, lines)) <= ADVERT_BYTES_MAX
    assert TOLD_BYTES_MAX - ADVERT_BYTES_MAX < sum(map(len, lines)) <= TOLD_BYTES_MAX


def test_givers_of_one_address_range_are_one() -> None:
    assert giver_of(ALICE.peer, "45.1.0.7") == giver_of(BOB.peer, "45.1.9.9")
    assert giver_of(ALICE.peer, "45.2.0.7") != giver_of(BOB.peer, "45.1.9.9")
    assert giver_of(ALICE.peer, "192.168.1.7") != giver_of(BOB.peer, "192.168.1.8")
    assert giver_of(ALICE.peer, None) == giver_of(BOB.peer, None)


# --- between nodes --------------------------------------------------------------------------------------------


def exchange_on(
    host: SimHost, signer: Identity, own: Callable[[], Advert | None] = lambda: None, *known: Identity
) -> AdvertExchange:
    records = [PeerRecord(each.peer, (address_of(each.peer),)) for each in known]
    return AdvertExchange(
        transport=host,
        visits=Visits(host, guests_max=0),
        signer=signer,
        ledger=PeerLedger(),
        limits=DEFAULT_LIMITS,
        rng=random.Random(2),
        wall_time_s=lambda: NOW_S + trio.current_time(),
        own=own,
        known=lambda: records,
    )


async def test_adverts_travel_by_questions_and_are_signed_anew(autojump_clock: MockClock) -> None:
    def own() -> Advert:
        return advert_of(expires_s=ADVERT_S + trio.current_time())

    async with (
        open_sim_network(random.Random(1)) as network,
        network.open_host(ALICE.peer) as first,
        network.open_host(BOB.peer) as second,
        network.open_host(CAROL.peer) as third,
        open_service_nursery() as nursery,
    ):
        exchanges = [
            exchange_on(first, ALICE, own),
            exchange_on(second, BOB, lambda: None, ALICE),
            exchange_on(third, CAROL, lambda: None, BOB),
        ]
        for exchange in exchanges:
            nursery.start_soon(exchange.run)
        await trio.sleep(FIRST_ASK_S * 2 + ASK_S * 2)
        # The third has never met the first; nobody stays connected for this.
        (line,) = exchanges[2].told()
        before = msgspec.json.decode(line, type=Advert)
        assert before.peer == ALICE.peer
        assert third.peers() == second.peers() == frozenset()
        await trio.sleep(RENEW_S + 3 * ASK_S)
        (line,) = exchanges[2].told()
        assert msgspec.json.decode(line, type=Advert).claim.expires_unix_s > before.claim.expires_unix_s


async def test_who_passes_on_a_forged_advert_is_noted_and_the_rest_not_looked_at(
    autojump_clock: MockClock,
) -> None:
    forged = msgspec.structs.replace(advert_of(1), signature=base64.b64encode(bytes(64)).decode())

    async def answer(peer: object, request: WantAdverts) -> Adverts:
        good = [line_of(0), line_of(2, expires_s=-1)]
        return Adverts(adverts=[*good, forged.line().encode(), forged.line().encode(), line_of(3)])

    async with (
        open_sim_network(random.Random(1)) as network,
        network.open_host(ALICE.peer) as liar,
        network.open_host(BOB.peer) as host,
        open_service_nursery() as nursery,
    ):
        serve_calls(
            liar,
            ADVERTS_PROTOCOL,
            WantAdverts,
            answer,
            limits=DEFAULT_LIMITS,
            on_malformed=lambda peer, error: None,
        )
        exchange = exchange_on(host, BOB, lambda: None, ALICE)
        nursery.start_soon(exchange.run)
        await trio.sleep(FIRST_ASK_S * 2)
        assert exchange.told() == [line_of(0)]
        assert exchange._ledger.refusals == {"signature": 1}
        assert 0 < exchange._ledger.standing(ALICE.peer) < STANDING_MAX
        # More than was asked for is not looked at either.
        await host.connect(PeerRecord(ALICE.peer, (address_of(ALICE.peer),)))
        with pytest.raises(MalformedMessage, match="were asked for"):
            await fetch_adverts(host, ALICE.peer, 4)
