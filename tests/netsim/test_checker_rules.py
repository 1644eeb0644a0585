"""What the checkers compute for themselves, and how they look on: rules on their own, without a world."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossip.merge_acceptor import AcceptorState
from gossip.merge_chain import MergeChain
from gossip.merge_record import capped_weights, genesis_hash, record_hash
from gossip.messages import AcceptedRecord, Ballot, CommittedRecord, MergeRecord, RosterEntry, ShardRef
from gossip.store import outline_of
from netsim.checkers.anchors import average, name_of
from netsim.checkers.base import FAILURES_MAX, Machine, Watcher, World
from netsim.checkers.order import Agreement
from netsim.disk import SimDisk
from p2p.limits import Limits
from tests.gossip.merge_world import CheapSigner, peer_named
from training.merge_math import weighted_average

RUN = bytes(32)
REF = ShardRef(root=bytes(32), size=4)
FAILURE = tuple[str, str, int | None]


class Onlooker(Watcher):
    """A checker that does nothing by itself."""

    name = "onlooker"


class Part:
    """Something to watch."""

    def double(self, number: int) -> int:
        if number < 0:
            raise ValueError("negative")
        return 2 * number

    async def wait(self, number: int) -> int:
        return self.double(number)


@pytest.fixture
def told() -> list[FAILURE]:
    return []


def world_of(machines: int) -> World:
    made = [
        SimpleNamespace(
            number=number,
            identity=CheapSigner(peer_named(number)),
            disk=SimDisk(),
            node=None,
            honest=True,
        )
        for number in range(machines)
    ]
    return cast(World, SimpleNamespace(machines=made, calm_since_s=None, core=()))


@pytest.fixture
def onlooker(told: list[FAILURE]) -> Onlooker:
    return Onlooker(world_of(2), lambda *failure: told.append(failure))


# --- looking on ---------------------------------------------------------------------------------------------------


async def test_calls_are_seen_before_and_after_and_left_as_they_are(onlooker: Onlooker) -> None:
    seen: list[Any] = []
    part = Part()
    onlooker.watch(part, "double", lambda number: (seen.append(number), seen.append)[1])
    onlooker.after(part, "wait", lambda result, number: seen.append((result, number)))
    assert part.double(4) == 8
    assert seen == [4, 8]
    assert await part.wait(5) == 10
    assert seen == [4, 8, 5, 10, (10, 5)]


async def test_what_the_product_raises_is_its_own(onlooker: Onlooker, told: list[FAILURE]) -> None:
    seen: list[Any] = []
    part = Part()
    onlooker.after(part, "double", lambda result, number: seen.append(result))
    onlooker.watch(part, "wait", lambda number: seen.append, raised=lambda error: seen.append(str(error)))
    with pytest.raises(ValueError, match="negative"):
        part.double(-1)
    with pytest.raises(ValueError, match="negative"):
        await part.wait(-1)
    assert seen == ["negative"]
    assert told == []


async def test_a_mistake_of_a_checker_is_told_and_goes_no_further(
    onlooker: Onlooker, told: list[FAILURE]
) -> None:
    part = Part()
    onlooker.after(part, "double", lambda result, number: 1 // 0)
    onlooker.watch(part, "wait", lambda: None)
    assert part.double(4) == 8
    assert await part.wait(4) == 8
    assert [checker for checker, _, _ in told] == ["onlooker", "onlooker"]
    assert "ZeroDivisionError" in told[0][1]
    assert "TypeError" in told[1][1]


def test_a_failure_is_told_once_and_not_without_end(onlooker: Onlooker, told: list[FAILURE]) -> None:
    onlooker.fail("broken", 1)
    onlooker.fail("broken", 1)
    onlooker.fail("broken", 0)
    assert told == [("onlooker", "broken", 1), ("onlooker", "broken", 0)]
    for number in range(100):
        onlooker.fail(f"broken {number}")
    assert len(told) == FAILURES_MAX


# --- averages -----------------------------------------------------------------------------------------------------

WEIGHTED = st.lists(
    st.tuples(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3),
        st.integers(1, 1 << 40),
    ),
    min_size=1,
    max_size=9,
)


@given(WEIGHTED)
def test_the_average_is_the_products_bit_for_bit(inputs: list[tuple[list[float], int]]) -> None:
    values = [np.array(numbers, np.float32) for numbers, _ in inputs]
    weights = [weight for _, weight in inputs]
    tensors = [torch.from_numpy(one) for one in values]
    theirs = weighted_average(list(zip(tensors, capped_weights(weights), strict=True)))
    assert average(values, weights).tobytes() == theirs.numpy().tobytes()


def test_no_weight_counts_more_than_twice_the_median() -> None:
    values = [np.array([number], np.float32) for number in (0.0, 0.0, 1.0)]
    assert average(values, [1, 1, 1_000_000]) == pytest.approx(2 / 4)


# --- agreement ----------------------------------------------------------------------------------------------------


def record_of(
    *, voters: range, parent: bytes, height: int, absent: tuple[int, ...] = (), attempt: int = 0
) -> CommittedRecord:
    """A committed record on a link; of what it says only who had a voice, and what makes it unlike others, count."""
    ballot = Ballot(attempt=attempt, proposer=peer_named(attempt))
    record = MergeRecord(
        run=RUN,
        parent=parent,
        height=height,
        point=1,
        ballot=ballot,
        contributors=[],
        results=[REF],
        moved=[0],
        updates=[],
        roster=[RosterEntry(peer=peer_named(number), last_height=height) for number in voters],
        absent=[peer_named(number) for number in absent],
        participants_total=100 * height + attempt,
    )
    return CommittedRecord(record=record, ballot=ballot, acknowledgements=[])


@pytest.fixture
def agreement(told: list[FAILURE]) -> Agreement:
    return Agreement(world_of(6), lambda *failure: told.append(failure))


async def see(agreement: Agreement, *committed: CommittedRecord) -> None:
    """Have one chain hold the records, each seen as it is added."""
    chain = MergeChain(SimDisk(), run=RUN, limits=Limits())
    agreement.after(chain, "_follow", lambda _, name: agreement._check_committed(chain, name))
    for one in committed:
        await chain.add(one)


async def test_one_record_on_a_link_is_held_by_many(agreement: Agreement, told: list[FAILURE]) -> None:
    first = record_of(voters=range(4), parent=genesis_hash(RUN), height=1)
    await see(agreement, first)
    await see(agreement, first)
    assert told == []


@pytest.mark.parametrize("later_first", [False, True])
@pytest.mark.parametrize(
    ("absent", "other_absent", "allowed"),
    [
        ((), (), False),
        ((0,), (), False),
        ((0, 1), (2, 3, 4, 5), True),
        ((0, 1), (4, 5), True),
        ((0, 1), (0,), False),
        ((0, 1, 2), (3, 4, 5), True),
        ((0, 1), (0, 1, 2, 3), True),
        ((0, 1, 2, 3), (0, 1), False),
        ((0, 1), (0, 1, 2), False),
    ],
)
async def test_two_records_on_a_link_are_allowed_where_quorums_need_not_meet_or_the_earlier_was_given_up(
    agreement: Agreement,
    told: list[FAILURE],
    absent: tuple[int, ...],
    other_absent: tuple[int, ...],
    allowed: bool,
    later_first: bool,
) -> None:
    root = record_of(voters=range(6), parent=genesis_hash(RUN), height=1)
    parent = record_hash(root.record)
    one = record_of(voters=range(6), parent=parent, height=2, absent=absent)
    other = record_of(voters=range(6), parent=parent, height=2, absent=other_absent, attempt=1)
    for seen in (other, one) if later_first else (one, other):
        await see(agreement, root, seen)
    assert (told == []) == allowed


async def test_at_genesis_each_record_has_the_electorate_it_names(
    agreement: Agreement, told: list[FAILURE]
) -> None:
    genesis = genesis_hash(RUN)
    await see(agreement, record_of(voters=range(3), parent=genesis, height=1))
    await see(agreement, record_of(voters=range(3, 6), parent=genesis, height=1, attempt=1))
    assert told == []
    await see(agreement, record_of(voters=range(4), parent=genesis, height=1, attempt=2))
    assert [checker for checker, _, _ in told] == ["agreement"]


async def test_a_founder_may_go_on_alone_after_a_record_with_both_but_not_the_other_way_round(
    agreement: Agreement, told: list[FAILURE]
) -> None:
    genesis = genesis_hash(RUN)
    await see(agreement, record_of(voters=range(2), parent=genesis, height=1, attempt=1))
    await see(agreement, record_of(voters=range(1), parent=genesis, height=1, attempt=2))
    assert told == []
    await see(agreement, record_of(voters=range(1, 2), parent=genesis, height=1, attempt=0))
    assert [checker for checker, _, _ in told] == ["agreement"]


def word(attempt: int | None, accepted: int | None = None) -> AcceptorState:
    """A member's word: what it has promised and what it has accepted, by the attempts of their ballots."""
    record = record_of(voters=range(3), parent=RUN, height=1).record

    def ballot(number: int) -> Ballot:
        return Ballot(attempt=number, proposer=peer_named(0))

    return AcceptorState(
        parent=RUN,
        promised=None if attempt is None else ballot(attempt),
        accepted=None if accepted is None else AcceptedRecord(ballot=ballot(accepted), record=record),
    )


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([word(0), word(0), word(3)], True),
        ([word(0), word(1, 1), word(2, 1), word(2, 2)], True),
        ([word(3), word(2)], False),
        ([word(1, 1), word(2)], False),
        ([word(1, 1), word(2, 0)], False),
        ([word(1), word(None)], False),
    ],
)
async def test_a_members_word_holds_whatever_life_it_was_given_in(
    agreement: Agreement, told: list[FAILURE], words: list[AcceptorState], kept: bool
) -> None:
    machine: Machine = agreement.world.machines[1]
    await machine.disk.write_atomic(f"shards/{REF.root.hex()}-{REF.size}", b"sum", sync=True)
    for one in words:
        agreement._check_word(machine, RUN, one)
    assert (told == []) == kept


def test_other_links_and_other_members_have_their_own_word(agreement: Agreement, told: list[FAILURE]) -> None:
    machines = agreement.world.machines
    agreement._check_word(machines[0], RUN, word(3))
    agreement._check_word(machines[1], RUN, word(2))
    agreement._check_word(machines[0], b"x" * 32, word(0))
    assert told == []


async def test_a_word_that_a_power_cut_can_take_back_was_given_too_early(
    agreement: Agreement, told: list[FAILURE]
) -> None:
    machine = agreement.world.machines[0]
    await machine.disk.write_atomic("merges/promise", b"word", sync=False)
    agreement._check_word(machine, RUN, word(0))
    assert [checker for checker, _, _ in told] == ["agreement"]


@pytest.mark.parametrize("sync", [None, False, True])
async def test_whoever_accepts_a_record_must_have_its_results_on_disk(
    agreement: Agreement, told: list[FAILURE], sync: bool | None
) -> None:
    machine = agreement.world.machines[1]
    if sync is not None:
        await machine.disk.write_atomic(f"shards/{REF.root.hex()}-{REF.size}", b"sum", sync=sync)
    agreement._check_word(machine, RUN, word(1, 1))
    assert [checker for checker, _, _ in told] == ([] if sync else ["agreement"])


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1 << 20, (1 << 20) + 1])
async def test_names_are_those_of_the_store(size: int, autojump_clock: object) -> None:
    data = bytes(size)
    assert name_of(data) == (await outline_of(data))[0]
