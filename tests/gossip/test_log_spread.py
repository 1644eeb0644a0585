"""Batches over the simulated network: all arrive everywhere, once each, whoever is cut off, dies or lies."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import pytest
import trio

from gossip import log_spread
from gossip.ledger import PeerLedger
from gossip.log_exchange import HOLLOW_MAX
from gossip.log_spread import STILL_S, LogSpread
from gossip.messages import (
    LOG_PROTOCOL,
    LOG_SYNC_PROTOCOL,
    LOGS_MAX,
    Batches,
    Heads,
    Message,
    Push,
    Quiet,
    WantBatches,
    WantHeads,
)
from gossip.record_batches import LogRules, log_name, make
from gossip.record_logs import RecordLogs
from netsim.connection import Frame
from netsim.network import SimHost, SimNetwork, open_sim_network
from p2p.errors import StreamBroken
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS
from p2p.transport import PeerId
from tests.conftest import Entries
from tests.gossip.world import IDENTITIES, OTHER_RUN, RUN

RULES = LogRules(records_max=64, allowance=10_000, reach=10_000)


class Member:
    """One node's logs and what spreads them."""

    def __init__(self, identity: Identity, host: SimHost, seed: int, rules: LogRules = RULES) -> None:
        self.identity = identity
        self.host = host
        self.logs = RecordLogs(run=RUN, signer=identity, rules=rules)
        self.ledger = PeerLedger()
        self.spread = LogSpread(
            transport=host,
            logs=self.logs,
            ledger=self.ledger,
            limits=DEFAULT_LIMITS,
            rng=random.Random(seed),
            changed=lambda: None,
        )
        self.name: bytes | None = None

    def batch(self, records: bytes = b"\1\2\3", incarnation: int = 1) -> bytes:
        """The next batch of our own log, signed and not yet held."""
        last = self.logs.last(self.name) if self.name is not None else None
        return make(RUN, self.identity, last, incarnation, self.logs.records, records)

    def write(self, records: bytes = b"\1\2\3") -> None:
        """Make a batch and push it."""
        self.spread.publish(self.batch(records))
        self.name = next(batch.log for batch in self.logs.counting() if batch.author == self.identity.peer)


@contextlib.asynccontextmanager
async def swarm(count: int, rules: LogRules = RULES) -> AsyncIterator[tuple[SimNetwork, list[Member]]]:
    async with (
        open_sim_network(random.Random(1), limits=DEFAULT_LIMITS) as network,
        trio.open_nursery() as nursery,
        contextlib.AsyncExitStack() as stack,
    ):
        members = []
        for number, identity in enumerate(IDENTITIES[:count]):
            host = await stack.enter_async_context(network.open_host(identity.peer))
            members.append(Member(identity, host, number, rules))
            nursery.start_soon(members[-1].spread.run)
        yield network, members
        nursery.cancel_scope.cancel()


async def connect_all(members: list[Member]) -> None:
    for number, member in enumerate(members):
        for other in members[:number]:
            await member.host.connect(other.host.local)


async def agree(members: list[Member], *, within_s: float) -> None:
    with trio.fail_after(within_s):
        while len({member.logs.digest() for member in members}) > 1:
            await trio.sleep(0.02)


def tell_digests(members: list[Member]) -> None:
    """What heartbeats do."""
    for member in members:
        for other in members:
            if other is not member:
                member.spread.heard_digest(other.identity.peer, other.logs.digest())


async def test_every_batch_arrives_everywhere_and_once_after_the_first(autojump_clock: object) -> None:
    """The first batch of a log finds its way; from then on nobody is sent what it has."""
    async with swarm(4) as (_, members):
        await connect_all(members)
        for member in members:
            member.write()
            await trio.sleep(1)
        await agree(members, within_s=1)
        before = sum(member.spread.duplicates for member in members)
        for _ in range(20):
            for member in members:
                member.write()
                await trio.sleep(0.5)
        await agree(members, within_s=1)
        assert sum(member.spread.duplicates for member in members) == before
        assert members[0].logs.records == 4 * 21 * 3


async def test_a_tree_grows_again_when_a_branch_breaks(autojump_clock: object) -> None:
    """In a ring every log comes from one side; cut there, it comes from the other."""
    async with swarm(5) as (_, members):
        for left, right in zip(members, [*members[1:], members[0]], strict=True):
            await left.host.connect(right.host.local)
        for _ in range(3):
            for member in members:
                member.write()
                await trio.sleep(0.5)
        await agree(members, within_s=2)
        await members[0].host.disconnect(members[1].identity.peer, "cut")
        await trio.sleep(1)
        for _ in range(3):
            for member in members:
                member.write()
                await trio.sleep(0.5)
        await agree(members, within_s=2)
        assert members[0].logs.records == 5 * 6 * 3


async def test_a_newcomer_gets_everything_from_one_neighbour(autojump_clock: object) -> None:
    async with swarm(4) as (_, members):
        await connect_all(members[:3])
        for _ in range(50):
            for member in members[:3]:
                member.write()
        await agree(members[:3], within_s=5)
        await members[3].host.connect(members[0].host.local)
        await agree(members, within_s=5)
        members[1].write()
        await agree(members, within_s=2)


async def test_two_halves_that_went_on_alone_agree_when_they_meet(autojump_clock: object) -> None:
    """They meet at one link; the rest of both halves hears of it from those who meet."""
    async with swarm(6) as (_, members):
        for half in (members[:3], members[3:]):
            await connect_all(half)
            for _ in range(10):
                for member in half:
                    member.write()
        await members[2].host.connect(members[3].host.local)
        await agree(members, within_s=5)
        assert members[5].logs.records == 6 * 10 * 3


async def test_what_was_lost_on_the_way_shows_at_the_next_batch(autojump_clock: object) -> None:
    async with swarm(2) as (_, (writer, reader)):
        await connect_all([writer, reader])
        writer.write()
        await agree([writer, reader], within_s=1)
        writer.logs.offer(writer.batch(b"\7"))  # held, and never pushed
        await trio.sleep(5)
        assert reader.logs.digest() != writer.logs.digest()
        writer.write()
        await agree([writer, reader], within_s=2)


async def test_a_member_that_tells_twice_of_something_unknown_is_asked(autojump_clock: object) -> None:
    async with swarm(2) as (_, (writer, reader)):
        await connect_all([writer, reader])
        writer.write()
        await agree([writer, reader], within_s=1)
        writer.logs.offer(writer.batch(b"\7"))
        for _ in range(2):
            assert reader.logs.digest() != writer.logs.digest()
            reader.spread.heard_digest(writer.identity.peer, writer.logs.digest())
            await trio.sleep(1)
        assert reader.logs.digest() == writer.logs.digest()


async def test_the_last_batch_of_a_log_is_asked_for_after_one_word_of_it(autojump_clock: object) -> None:
    """Once nothing is under way any more, a vector that was never ours can only be of something we lack."""
    async with swarm(2) as (_, (writer, reader)):
        await connect_all([writer, reader])
        writer.write()
        await agree([writer, reader], within_s=1)
        writer.logs.offer(writer.batch(b"\7"))
        reader.spread.heard_digest(writer.identity.peer, writer.logs.digest())
        await agree([writer, reader], within_s=STILL_S + 1)


async def test_while_news_keeps_coming_one_unknown_vector_is_not_asked_about(autojump_clock: object) -> None:
    async with swarm(2) as (_, (writer, reader)):
        await connect_all([writer, reader])
        writer.write()
        await agree([writer, reader], within_s=1)
        rounds = reader.spread.exchange.rounds
        reader.spread.heard_digest(writer.identity.peer, bytes(32))
        for _ in range(20):
            writer.write()
            await trio.sleep(STILL_S / 2)
        assert reader.spread.exchange.rounds == rounds
        await trio.sleep(STILL_S)
        assert reader.spread.exchange.rounds == rounds + 1


async def test_a_push_that_breaks_off_leads_to_a_comparison(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells of it, and no batch comes after it."""
    broken = []

    async def break_once(stream: FlowStream, message: Message) -> None:
        if not broken and isinstance(message, Push):
            broken.append(message)
            raise StreamBroken("the stream broke")
        await send_message(stream, message)

    async with swarm(2) as (_, (writer, reader)):
        await connect_all([writer, reader])
        await trio.sleep(1)
        monkeypatch.setattr(log_spread, "send_message", break_once)
        writer.write()
        await agree([writer, reader], within_s=3)
        assert broken
        assert reader.logs.records == 3


async def test_who_does_not_listen_is_tried_ever_more_rarely_and_told_once_it_does(
    autojump_clock: object,
) -> None:
    told: list[Frame] = []

    class Trace:
        def delivered(self, at_s: float, source: int, target: int, kind: Frame, *_: object) -> None:
            told.append(kind)

    async with (
        swarm(1) as (network, (writer,)),
        network.open_host(IDENTITIES[1].peer) as deaf,
        trio.open_nursery() as nursery,
    ):
        await writer.host.connect(deaf.local)
        await trio.sleep(1)  # the newcomer is asked what it holds
        network.trace = Trace()
        for _ in range(5):
            writer.write()
            await trio.sleep(60)
        assert 5 < told.count(Frame.OPEN) < 15
        assert Frame.DATA not in told, "nothing is said to who does not listen"
        network.trace = None
        late = Member(IDENTITIES[1], deaf, 1)
        nursery.start_soon(late.spread.run)
        await agree([writer, late], within_s=61)
        nursery.cancel_scope.cancel()


async def test_a_fork_is_denounced_to_all_and_its_author_banned(autojump_clock: object) -> None:
    """Told one history here and another there, the members find out when they tell each other how far they are."""
    async with swarm(5) as (_, members):
        await connect_all(members)
        liar, *others = members
        for member in members:
            member.write()
        await agree(members, within_s=2)
        await trio.sleep(1)  # every log has its tree
        one, other = liar.batch(b"\5"), liar.batch(b"\6")
        for packed, told in ((one, others[:2]), (other, others[2:])):
            for member in told:
                stream = await liar.host.open_stream(member.identity.peer, LOG_PROTOCOL)
                await send_message(stream, Push(batches=[packed]))
        await trio.sleep(1)
        assert len({member.logs.digest() for member in others}) == 2
        for _ in range(2):
            tell_digests(others)
            await trio.sleep(1)
        await agree(others, within_s=1)
        assert [head.forked for head in others[0].logs.heads()].count(True) == 1
        assert all(member.ledger.banned(liar.identity.peer) for member in others)
        assert others[0].logs.records == 5 * 3


async def test_what_is_valid_nowhere_costs_who_brings_it(autojump_clock: object) -> None:
    async with swarm(2) as (_, (liar, honest)):
        await connect_all([liar, honest])
        forged = make(OTHER_RUN, liar.identity, None, 1, 0, b"\1")
        stream = await liar.host.open_stream(honest.identity.peer, LOG_PROTOCOL)
        await send_message(stream, Push(batches=[forged] * 3))
        await trio.sleep(1)
        assert honest.ledger.refusals["signature"] == 3
        assert honest.logs.records == 0
        assert honest.ledger.banned(liar.identity.peer)


async def test_a_version_vector_of_what_does_not_exist_is_asked_about_once(autojump_clock: object) -> None:
    """Heads from the future, or invented: one question, no batches, and no loop."""
    async with (
        open_sim_network(random.Random(1), limits=DEFAULT_LIMITS) as network,
        network.open_host(IDENTITIES[0].peer) as host,
        network.open_host(IDENTITIES[1].peer) as liar,
        trio.open_nursery() as nursery,
    ):
        honest = Member(IDENTITIES[0], host, 0)
        asked = []

        async def answer(_peer: PeerId, stream: FlowStream) -> None:
            asked.append(await receive_message(stream, WantHeads | WantBatches, bytes_max=1 << 20))
            if isinstance(asked[-1], WantHeads):
                row = bytes(16) + (10**6).to_bytes(8, "big") + bytes([7]) * 32 + b"\0"
                await send_message(stream, Heads(rows=row))
            else:
                await send_message(stream, Batches(batches=[]))

        liar.serve(LOG_SYNC_PROTOCOL, answer)
        nursery.start_soon(honest.spread.run)
        await liar.connect(host.local)
        await trio.sleep(60)
        assert [type(request) for request in asked] == [WantHeads, WantBatches]
        assert honest.logs.records == 0
        nursery.cancel_scope.cancel()


async def test_names_that_are_cut_short_are_malformed(autojump_clock: object) -> None:
    async with swarm(2) as (_, (liar, honest)):
        await connect_all([liar, honest])
        stream = await liar.host.open_stream(honest.identity.peer, LOG_PROTOCOL)
        await send_message(stream, Quiet(logs=bytes(17)))
        await trio.sleep(1)
        assert honest.ledger.refusals["malformed"] == 1


# --- whoever lies, floods or stalls -----------------------------------------------------------------------------------


async def push(liar: Member, honest: Member, batches: list[bytes], times: int = 1) -> None:
    stream = await liar.host.open_stream(honest.identity.peer, LOG_PROTOCOL)
    for _ in range(times):
        await send_message(stream, Push(batches=batches))
    await trio.sleep(1)


async def test_a_replayed_batch_is_counted_and_costs_whoever_goes_on(autojump_clock: object) -> None:
    async with swarm(3) as (_, (writer, replayer, honest)):
        await connect_all([writer, replayer, honest])
        for _ in range(5):
            writer.write()
        await trio.sleep(1)
        before = honest.logs.digest()
        old = next(honest.logs.batches()).packed
        await push(replayer, honest, [old] * 100)
        assert honest.spread.duplicates >= 100
        assert honest.ledger.standing(replayer.identity.peer) == 100, "so much may cross our Quiet on the way"
        await push(replayer, honest, [old] * 100, times=4)
        assert honest.ledger.refusals["replay"] > 0
        assert honest.ledger.banned(replayer.identity.peer)
        assert not honest.ledger.banned(writer.identity.peer)
        assert honest.logs.digest() == before


async def test_batches_in_any_order_and_number_come_to_the_same(autojump_clock: object) -> None:
    async with swarm(3) as (_, (writer, messenger, honest)):
        await messenger.host.connect(honest.host.local)
        for _ in range(12):
            writer.write()
        batches = [batch.packed for batch in writer.logs.batches()]
        await push(messenger, honest, [*reversed(batches), *batches, *reversed(batches)])
        assert honest.logs.digest() == writer.logs.digest()
        assert honest.logs.records == writer.logs.records
        assert not honest.ledger.refusals


@pytest.mark.parametrize("fault", ["malformed", "oversized", "clock-fell", "flood", "signature"])
async def test_each_fault_is_refused_counted_and_told(
    autojump_clock: object, fault: str, told: Entries
) -> None:
    """Held is nothing of it, and a few of them are enough."""
    async with swarm(3, LogRules(records_max=64, allowance=54)) as (_, (writer, liar, honest)):
        await connect_all([writer, liar, honest])
        writer.spread.publish(make(RUN, writer.identity, None, 1, 9, b"\1\2\3\4"))
        writer.name = log_name(RUN, writer.identity.peer, 1)
        await agree([writer, liar, honest], within_s=1)
        last = writer.logs.last(writer.name)
        signer = writer.identity
        bad = {
            "malformed": b"no batch",
            "oversized": make(RUN, signer, last, 1, 9, b"\1" * 65),
            "clock-fell": make(RUN, signer, last, 1, 8, b"\1"),
            "flood": make(RUN, signer, last, 1, 9, b"\1" * 60),
            "signature": make(RUN, liar.identity, last, 1, 9, b"\1"),
        }[fault]
        before = honest.logs.digest(), honest.logs.records
        await push(liar, honest, [bad])
        assert (honest.logs.digest(), honest.logs.records) == before
        assert honest.ledger.refusals[fault] == 1
        assert honest.ledger.last_problem(liar.identity.peer).startswith(fault)
        assert ("refused", liar.identity.peer, fault) in [
            (entry["event"], entry.get("peer"), entry.get("reason")) for entry in told
        ]
        await push(liar, honest, [bad] * 4)
        assert honest.ledger.banned(liar.identity.peer)
        assert not honest.ledger.banned(writer.identity.peer)


@contextlib.asynccontextmanager
async def answered_by(answer: object) -> AsyncIterator[tuple[Member, SimHost]]:
    """An honest member, connected to a host that answers its questions in its own way."""
    async with (
        open_sim_network(random.Random(1), limits=DEFAULT_LIMITS) as network,
        network.open_host(IDENTITIES[0].peer) as host,
        network.open_host(IDENTITIES[1].peer) as liar,
        trio.open_nursery() as nursery,
    ):
        honest = Member(IDENTITIES[0], host, 0)
        liar.serve(LOG_SYNC_PROTOCOL, answer)  # type: ignore[arg-type]
        nursery.start_soon(honest.spread.run)
        await liar.connect(host.local)
        yield honest, liar
        nursery.cancel_scope.cancel()


def rows(count: int) -> bytes:
    """A version vector of logs that do not exist."""
    return b"".join(
        number.to_bytes(16, "big") + (10**6).to_bytes(8, "big") + bytes([7]) * 32 + b"\0"
        for number in range(count)
    )


async def test_who_tells_of_many_logs_and_serves_none_is_not_asked_for_all(autojump_clock: object) -> None:
    asked = []

    async def answer(_peer: PeerId, stream: FlowStream) -> None:
        asked.append(await receive_message(stream, WantHeads | WantBatches, bytes_max=1 << 20))
        hollow = isinstance(asked[-1], WantBatches)
        await send_message(stream, Batches(batches=[]) if hollow else Heads(rows=rows(LOGS_MAX)))

    async with answered_by(answer) as (honest, liar):
        await trio.sleep(600)
        assert len(asked) < 2 * HOLLOW_MAX
        assert honest.ledger.refusals["not-served"] == 1
        assert honest.ledger.last_problem(liar.local.peer).startswith("not-served")
        assert honest.logs.records == 0


async def test_who_serves_other_bytes_for_a_batch_is_refused(autojump_clock: object) -> None:
    """What was asked for has a name; what comes is somebody else's batch, altered or of another run."""
    other = make(OTHER_RUN, IDENTITIES[2], None, 1, 0, b"\1")

    async def answer(_peer: PeerId, stream: FlowStream) -> None:
        request = await receive_message(stream, WantHeads | WantBatches, bytes_max=1 << 20)
        hollow = isinstance(request, WantBatches)
        await send_message(stream, Batches(batches=[other]) if hollow else Heads(rows=rows(50)))

    async with answered_by(answer) as (honest, liar):
        await trio.sleep(60)
        assert honest.ledger.refusals["signature"] == 3, "the round ends with the ban"
        assert honest.ledger.banned(liar.local.peer)
        assert honest.logs.records == 0


async def test_who_stalls_in_the_middle_of_an_answer_is_let_go_and_costs_points(
    autojump_clock: object,
) -> None:
    async def answer(_peer: PeerId, stream: FlowStream) -> None:
        await receive_message(stream, WantHeads | WantBatches, bytes_max=1 << 20)
        await stream.send_all((1000).to_bytes(4, "big") + b"half of it")
        await trio.sleep_forever()

    async with answered_by(answer) as (honest, liar):
        await trio.sleep(DEFAULT_LIMITS.call_timeout_s + 5)
        assert honest.spread.exchange.rounds_failed == 1
        assert honest.ledger.refusals["stall"] == 1
        assert honest.ledger.last_problem(liar.local.peer).startswith("stall")
        assert liar.traffic().streams_open <= 2


async def test_a_table_that_is_full_says_who_asks_for_more(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossip.record_logs.LOGS_MAX", 3)
    async with swarm(2) as (_, (liar, honest)):
        await connect_all([liar, honest])
        batches = [make(RUN, identity, None, 1, 0, b"\1") for identity in IDENTITIES[1:6]]
        await push(liar, honest, batches)
        assert len(honest.logs.heads()) == 3
        assert honest.ledger.refusals["table-full"] == 2
        assert not honest.ledger.banned(liar.identity.peer)
