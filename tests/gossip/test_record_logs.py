"""Whatever is said, by whomever, in whatever order: who holds the same batches lets the same ones count."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.messages import FirstBatch
from gossip.record_batches import Batch, Fault, InvalidBatch, LogRules, check, log_name, make, name_of, parse
from gossip.record_logs import OPENINGS_WAITING_MAX, Offer, RecordLogs
from tests.gossip.merge_world import CheapSigner, peer_named

RUN = bytes(32)
RULES = LogRules(records_max=8, allowance=12, share_percent=100, reach=6, opening_cost=5)
SIGNERS = [CheapSigner(peer_named(number)) for number in range(3)]


def logs(rules: LogRules = RULES) -> RecordLogs:
    return RecordLogs(run=RUN, signer=CheapSigner(peer_named(99)), rules=rules)


# --- histories that no honest author has, and some that one has ------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Batch ``parent`` places back in the same log (0: the last one, none left: another first), or a new log."""

    author: int
    incarnation: int
    back: int
    clock_step: int
    records: bytes


made = st.builds(
    Made,
    author=st.integers(0, 2),
    incarnation=st.sampled_from([0, 0, 0, 1, 2]),
    back=st.sampled_from([0] * 12 + [1, 2, 5]),
    clock_step=st.sampled_from([0, 1, 2, 3, 4, 5, 8, 14, 60, -1]),
    records=st.binary(min_size=1, max_size=6),
)
histories = st.lists(made, min_size=1, max_size=24)


def signed(history: Sequence[Made]) -> list[bytes]:
    """What the authors of ``history`` sign, in the order of their parents, valid or not."""
    packed: list[bytes] = []
    chains: dict[tuple[int, int], list[Batch]] = {}
    for item in history:
        chain = chains.setdefault((item.author, item.incarnation), [])
        parents = [None, *chain]
        before = parents[-1 - item.back] if item.back < len(parents) else None
        clock = max(0, (before.clock if before else 0) + item.clock_step)
        signer = SIGNERS[item.author]
        batch = make(RUN, signer, before, item.incarnation, clock, item.records)
        packed.append(batch)
        with contextlib.suppress(InvalidBatch):
            chain.append(check(RUN, batch, parse(batch), before, RULES, signer))
    return packed


def what_counts(packed: Iterable[bytes], rules: LogRules = RULES) -> set[bytes]:
    """The rules of docs/PROTOCOL.md, read aloud: no order, no increments, everything from nothing."""
    children: dict[bytes, dict[bytes, bytes]] = {}
    roots: dict[bytes, dict[bytes, bytes]] = {}
    for item in packed:
        message = parse(item)
        if isinstance(message, FirstBatch):
            log = log_name(RUN, peer_named(int(message.author[5:7])), message.incarnation)
            roots.setdefault(log, {})[name_of(RUN, message)] = item
        else:
            children.setdefault(message.previous, {})[name_of(RUN, message)] = item

    def valid(candidates: dict[bytes, bytes], before: Batch | None) -> list[Batch]:
        found = []
        for item in candidates.values():
            with contextlib.suppress(InvalidBatch):
                found.append(check(RUN, item, parse(item), before, rules, SIGNERS[0]))
        return found

    chains: dict[bytes, list[Batch]] = {}
    opened: dict[str, list[tuple[int, bytes]]] = {}
    for log, candidates in roots.items():
        chain: list[Batch] = []
        following = valid(candidates, None)
        if not following:
            continue
        author, incarnation = following[0].author, following[0].incarnation
        while len(following) == 1:
            chain.append(following[0])
            following = valid(children.get(chain[-1].name, {}), chain[-1])
        chains[log] = chain
        opened.setdefault(author, []).append((incarnation, log))
    ranks = {log: rank for by in opened.values() for rank, (_, log) in enumerate(sorted(by))}

    counting = dict.fromkeys(chains, 0)
    grew = True
    while grew:
        grew = False
        for log, chain in chains.items():
            records = sum(len(b.records) for other, n in counting.items() for b in chains[other][:n])
            if counting[log] < len(chain):
                need = max(chain[counting[log]].clock, ranks[log] * rules.opening_cost) - rules.reach
                if need <= records:
                    counting[log] += 1
                    grew = True
    return {batch.name for log, n in counting.items() for batch in chains[log][:n]}


def offer_until_still(table: RecordLogs, packed: Sequence[bytes]) -> None:
    """Offer all of it again and again, as neighbours do, until nothing changes."""
    before = None
    while before != table.digest():
        before = table.digest()
        for item in packed:
            with contextlib.suppress(InvalidBatch):
                table.offer(item)


def counted(table: RecordLogs) -> set[bytes]:
    return {batch.name for batch in table.counting()}


@settings(max_examples=400, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_what_counts_depends_on_what_is_held_and_on_nothing_else(
    history: list[Made], rng: random.Random
) -> None:
    packed = signed(history)
    expected = what_counts(packed)
    for _ in range(2):
        shuffled = [*packed, *rng.choices(packed, k=3)]
        rng.shuffle(shuffled)
        table = logs()
        offer_until_still(table, shuffled)
        assert counted(table) == expected
        assert table.records == sum(len(batch.records) for batch in table.counting())


@settings(max_examples=400, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_two_halves_of_a_swarm_agree_after_they_met(history: list[Made], rng: random.Random) -> None:
    packed = signed(history)
    halves = [logs(), logs()]
    heard: list[list[bytes]] = [[], []]
    for item in packed:
        for half in {0, 1} if rng.random() < 0.4 else {rng.randrange(2)}:
            heard[half].append(item)
    for table, items in zip(halves, heard, strict=True):
        rng.shuffle(items)
        offer_until_still(table, items)
    reconcile(*halves)
    assert halves[0].digest() == halves[1].digest()
    assert counted(halves[0]) == counted(halves[1])


def reconcile(one: RecordLogs, other: RecordLogs) -> None:
    """Tell each other what the other lacks until the version vectors are equal."""
    for _ in range(64):
        if one.digest() == other.digest():
            return
        for asker, teller in ((one, other), (other, one)):
            for head in teller.heads():
                for item in teller.after(head.log, asker.skeleton(head.log), 1 << 20):
                    with contextlib.suppress(InvalidBatch):
                        asker.offer(item)
    raise AssertionError("they never agree")


@settings(max_examples=150, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_changes_add_up_to_what_counts(history: list[Made], rng: random.Random) -> None:
    """Whenever one asks, and however often: what came less what went is what counts."""
    packed = signed(history)
    rng.shuffle(packed)
    table = logs()
    applied: set[bytes] = set()
    for item in packed * 3:
        with contextlib.suppress(InvalidBatch):
            table.offer(item)
        if rng.random() < 0.4:
            come, gone = table.take_changes()
            assert not applied & {batch.name for batch in come}
            assert applied >= {batch.name for batch in gone}
            applied |= {batch.name for batch in come}
            applied -= {batch.name for batch in gone}
            assert applied == counted(table)


@settings(max_examples=400, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_a_snapshot_and_what_follows_is_the_same_for_all(history: list[Made], rng: random.Random) -> None:
    """Who made it and forgot what it holds, who joined by it, and who comes with another history of a forked log."""
    packed = signed(history)
    maker, newcomer, late = logs(), logs(), logs()
    offer_until_still(maker, packed[: rng.randint(0, len(packed))])
    settlement = maker.settlement()
    assert maker.above(settlement) == []
    assert maker.settle(settlement)
    if rng.random() < 0.5:
        maker.forget(settlement)
    newcomer.begin_from(settlement)
    assert newcomer.records == maker.records

    offer_until_still(late, rng.sample(packed, len(packed)))
    if not late.settle(settlement):
        assert any(head.forked for head in late.heads())
        late.begin_from(settlement)
    for table in (maker, newcomer, late):
        offer_until_still(table, rng.sample(packed, len(packed)))
    reconcile(maker, late)
    reconcile(newcomer, late)
    reconcile(maker, newcomer)
    assert maker.records == newcomer.records == late.records
    beyond = [{batch.name for batch in table.above(settlement) or ()} for table in (maker, newcomer, late)]
    assert beyond[0] == beyond[1] == beyond[2]


@settings(max_examples=250, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_what_was_relied_on_before_the_latest_snapshot_decides_nothing(
    history: list[Made], rng: random.Random
) -> None:
    """Two tables relied on different snapshots, neither of which holds the other, and rely on one now."""
    packed = signed(history)
    maker, other, newcomer = logs(), logs(), logs()
    offer_until_still(maker, rng.sample(packed, rng.randint(0, len(packed))))
    offer_until_still(other, rng.sample(packed, rng.randint(0, len(packed))))
    before, latest = other.settlement(), maker.settlement()
    assert other.settle(before)
    if rng.random() < 0.5:
        assert other.forget(before)
    newcomer.begin_from(latest)
    for table in (maker, other):
        offer_until_still(table, rng.sample(packed, len(packed)))
        if not table.settle(latest):
            table.begin_from(latest)
    for table in (maker, other, newcomer):
        offer_until_still(table, rng.sample(packed, len(packed)))
    reconcile(maker, other)
    reconcile(newcomer, other)
    reconcile(maker, newcomer)
    assert maker.records == other.records == newcomer.records
    beyond = [{batch.name for batch in table.above(latest) or ()} for table in (maker, other, newcomer)]
    assert beyond[0] == beyond[1] == beyond[2]


# --- one rule at a time ---------------------------------------------------------------------------------------------


def batch_after(
    before: bytes | None, table: RecordLogs, *, clock: int, records: bytes = b"\1\2", incarnation: int = 7
) -> bytes:
    signer = SIGNERS[0]
    parent = None
    if before is not None:
        parent = next(batch for batch in table.counting() if batch.packed == before)
    return make(RUN, signer, parent, incarnation, clock, records)


def test_a_log_grows_in_order_and_is_held_once() -> None:
    table = logs()
    first = batch_after(None, table, clock=0)
    assert table.offer(first)[0] is Offer.ACCEPTED
    second = batch_after(first, table, clock=2)
    assert logs().offer(second)[0] is Offer.ORPHAN
    assert table.offer(second)[0] is Offer.ACCEPTED
    assert table.offer(first)[0] is Offer.KNOWN
    assert table.records == 4


def test_a_fork_ends_a_log_before_it_and_takes_back_what_followed() -> None:
    table = logs()
    first = batch_after(None, table, clock=0)
    table.offer(first)
    second, rival = (batch_after(first, table, clock=2, records=records) for records in (b"\3", b"\4"))
    table.offer(second)
    third = batch_after(second, table, clock=3)
    table.offer(third)
    table.take_changes()
    assert table.offer(rival)[0] is Offer.FORK
    assert {batch.packed for batch in table.counting()} == {first}
    assert {batch.packed for batch in table.take_changes()[1]} == {second, third}
    assert table.offer(second)[0] is Offer.KNOWN
    assert table.offer(third)[0] is Offer.ORPHAN
    assert [head.forked for head in table.heads()] == [True]


def test_the_proof_of_a_fork_reaches_who_holds_either_side() -> None:
    tables = [logs(), logs(), logs()]
    first = batch_after(None, tables[0], clock=0)
    for table in tables:
        table.offer(first)
    sides = [batch_after(first, tables[0], clock=2, records=records) for records in (b"\3", b"\4")]
    tables[0].offer(sides[0])
    tables[1].offer(sides[1])
    reconcile(tables[0], tables[1])
    reconcile(tables[1], tables[2])
    assert all({batch.packed for batch in table.counting()} == {first} for table in tables)


@pytest.mark.parametrize(
    ("clock", "records", "fault"),
    [(1, b"\1", Fault.CLOCK_FELL), (2, b"\1" * 9, Fault.OVERSIZED), (2, b"\1" * 8, Fault.FLOOD)],
)
def test_what_breaks_a_rule_is_refused_and_changes_nothing(clock: int, records: bytes, fault: Fault) -> None:
    table = logs()
    first = batch_after(None, table, clock=2, records=b"\1" * 7)
    table.offer(first)
    before = table.digest()
    with pytest.raises(InvalidBatch) as refused:
        table.offer(batch_after(first, table, clock=clock, records=records))
    assert refused.value.fault is fault
    assert table.digest() == before


def test_a_forged_signature_is_refused() -> None:
    table = logs()
    first = bytearray(batch_after(None, table, clock=0))
    place = first.index(b"isignature") + 12
    first[place] ^= 1
    with pytest.raises(InvalidBatch) as refused:
        table.offer(bytes(first))
    assert refused.value.fault is Fault.SIGNATURE


def test_a_batch_of_another_run_is_refused() -> None:
    table = RecordLogs(run=bytes([1]) * 32, signer=SIGNERS[0], rules=RULES)
    with pytest.raises(InvalidBatch):
        table.offer(batch_after(None, logs(), clock=0))


def test_a_clock_from_the_future_waits_for_it() -> None:
    table = logs()
    early = make(RUN, SIGNERS[0], None, 1, RULES.reach + 3, b"\1")
    table.offer(early)
    assert table.records == 0
    table.offer(make(RUN, SIGNERS[1], None, 1, 0, b"\1\2\3"))
    assert table.records == 4


def test_a_clock_that_flies_holds_up_nobody_else_and_fills_no_memory() -> None:
    table = logs()
    before = None
    offered = []
    for _ in range(40):
        packed = make(RUN, SIGNERS[0], before, 1, 10**9, b"\1")
        before = check(RUN, packed, parse(packed), before, RULES, SIGNERS[0])
        offered.append(table.offer(packed)[0])
    assert offered[:17] == [Offer.ACCEPTED] * 16 + [Offer.WAITING]
    assert Offer.ACCEPTED not in offered[16:]
    table.offer(make(RUN, SIGNERS[1], None, 1, 0, b"\1\2\3"))
    assert table.records == 3


def test_opening_many_logs_gives_no_room_for_more() -> None:
    """Six records of reach pay for one more log; each further one waits until others have made their records."""
    table = logs()
    for incarnation in range(20):
        table.offer(make(RUN, SIGNERS[0], None, incarnation, 0, b"\1"))
    assert table.records == 2
    for number in range(6):
        table.offer(make(RUN, SIGNERS[1 + number % 2], None, number, 0, b"\1\1"))
    assert table.records < 20


def test_a_log_that_is_forked_from_the_start_keeps_its_rank() -> None:
    """Which of its first batches is known differs from node to node, so nothing in them may decide anything."""
    table = logs()
    for clock, records in ((3, b"\1"), (0, b"\2")):
        table.offer(make(RUN, SIGNERS[0], None, 5, clock, records))
    assert table.records == 0
    for incarnation in (9, 4):
        table.offer(make(RUN, SIGNERS[0], None, incarnation, 2, b"\1"))
    # The forked one is the second of three, so the last one is the third, and waits.
    assert table.records == 1


def test_the_logs_of_one_author_fill_no_table() -> None:
    """One key can open logs without end. Held are those that count and the first of the rest, whatever came first."""
    packed = [make(RUN, SIGNERS[0], None, incarnation, 0, b"\1") for incarnation in range(60)]
    halves = [logs(), logs()]
    for table, order in zip(halves, (packed, packed[::-1]), strict=True):
        for item in order:
            assert table.offer(item)[0] is not Offer.FULL
            assert len(table._logs) <= 2 + OPENINGS_WAITING_MAX
        assert table.records == 2
    reconcile(*halves)
    assert len(halves[0].heads()) == 2 + OPENINGS_WAITING_MAX
    # Of what was let go of the rest is asked for when there is room for it.
    for table in halves:
        for number in range(6):
            table.offer(make(RUN, SIGNERS[1 + number % 2], None, number, 0, b"\1\1"))
        offer_until_still(table, packed)
    assert halves[0].records == halves[1].records > 8


def test_a_fork_is_proved_whatever_else_its_author_opened() -> None:
    """A table that holds the proof and one that never had room for it let the same batches count."""
    rivals = [make(RUN, SIGNERS[0], None, 30, clock, b"\1") for clock in (0, 9)]
    others = [make(RUN, SIGNERS[0], None, incarnation, 0, b"\1") for incarnation in range(20)]
    proved, filled = logs(), logs()
    for item in (*rivals, *others):
        proved.offer(item)
    for item in (*others, *rivals):
        filled.offer(item)
    reconcile(proved, filled)
    assert counted(proved) == counted(filled)


def test_forks_without_end_are_worked_out_once() -> None:
    """Each proof reaches further back than the one before it; the table is asked in the end, not at every proof."""
    table = logs(LogRules(records_max=8, allowance=4000))
    chain: list[Batch] = []
    for number in range(3000):
        before = chain[-1] if chain else None
        packed = make(RUN, SIGNERS[0], before, 1, 0, b"\1")
        chain.append(check(RUN, packed, parse(packed), before, LogRules(allowance=4000), SIGNERS[0]))
        assert table.offer(packed)[0] is Offer.ACCEPTED, number
    worked_out = 0
    again = table._count_again

    def count() -> None:
        nonlocal worked_out
        worked_out += 1
        again()

    table._count_again = count  # type: ignore[method-assign]
    for number in range(2999, 0, -1):
        rival = make(RUN, SIGNERS[0], chain[number - 1], 1, 0, b"\2")
        assert table.offer(rival)[0] is Offer.FORK
    assert table.records == 1
    assert worked_out == 1


def test_below_a_settlement_a_fork_is_told_of_once() -> None:
    table = logs()
    table.offer(first := batch_after(None, table, clock=0))
    table.offer(batch_after(first, table, clock=2, records=b"\3"))
    assert table.settle(table.settlement())
    before = table.digest()
    rivals = [batch_after(first, table, clock=2, records=records) for records in (b"\4", b"\5")]
    assert [table.offer(rival)[0] for rival in (*rivals, *rivals)] == [Offer.FORK] + 3 * [Offer.KNOWN]
    assert (table.digest(), table.records) == (before, 3)


def test_leaving_one_batch_out_changes_the_vector() -> None:
    tables = [logs(), logs()]
    packed = [make(RUN, signer, None, 1, 0, b"\1") for signer in SIGNERS]
    for table, items in zip(tables, (packed, packed[:-1]), strict=True):
        for item in items:
            table.offer(item)
    assert tables[0].digest() != tables[1].digest()


def test_a_log_of_many_batches_is_caught_up_from_any_place() -> None:
    full, behind = logs(), logs()
    before = None
    for number, _ in enumerate(itertools.repeat(None, 50)):
        packed = make(RUN, SIGNERS[0], before, 1, number, b"\1")
        before = check(RUN, packed, parse(packed), before, RULES, SIGNERS[0])
        full.offer(packed)
        if number < 13:
            behind.offer(packed)
    log = before.log
    missing = full.after(log, behind.skeleton(log), 1 << 20)
    assert len(missing) == 37
    assert len(full.after(log, behind.skeleton(log), 3 * len(missing[0]))) == 3
