"""Records in, records out, whoever made them: the weights are those of what counts, bit for bit."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.record_batches import Batch, InvalidBatch
from gossip.record_logs import RecordLogs
from netsim.record_learner import sketched_learner
from node.applied_records import AppliedRecords
from tests.gossip.test_record_logs import RUN, Made, histories, logs, signed, what_counts
from training.one_byte import RecordRun
from training.run_spec import parse_run_spec
from training.trainer import CheckpointError

SPEC = parse_run_spec('name = "applied"\ninit = "shared"\n[one_byte]\nstep_size = 1e-2\nhalvings = [5, 9]\n')


def applied() -> AppliedRecords:
    return AppliedRecords(sketched_learner(SPEC, RUN, "peer"))


def follow(records: AppliedRecords, table: RecordLogs) -> None:
    """Apply what has changed."""
    come, gone = table.take_changes()
    records.apply([], gone)
    records.apply(come, [])


def state_of(counting: list[Batch]) -> bytes:
    """The state hash of exactly these batches, from nothing."""
    learner = sketched_learner(SPEC, RUN, "another")
    learner.apply([RecordRun(batch.log, batch.first, batch.clock, batch.records) for batch in counting])
    return learner.digest()


@settings(max_examples=400, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_any_order_grouping_or_repetition_gives_the_same_state(
    history: list[Made], rng: random.Random
) -> None:
    """Honest batches, forks, floods and false clocks, delivered twice to nodes that look at them now and then."""
    packed = signed(history)
    hashes = set()
    for _ in range(2):
        table, records = logs(), applied()
        for _ in range(len(packed)):
            for item in rng.sample(packed, len(packed)):
                with contextlib.suppress(InvalidBatch):
                    table.offer(item)
                if rng.random() < 0.2:
                    follow(records, table)
            if {batch.name for batch in table.counting()} == what_counts(packed):
                break
        follow(records, table)
        hashes.add(records.learner.digest())
        assert records.records == table.records
    assert hashes == {state_of(list(table.counting()))}


@settings(max_examples=200, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_a_checkpoint_and_the_rest_give_what_the_whole_gives(history: list[Made], rng: random.Random) -> None:
    packed = signed(history)
    table, records = logs(), applied()
    for item in packed[: rng.randint(0, len(packed))]:
        with contextlib.suppress(InvalidBatch):
            table.offer(item)
    follow(records, table)
    saved = records.save()
    for item in packed:
        with contextlib.suppress(InvalidBatch):
            table.offer(item)
    follow(records, table)

    resumed, held = applied(), list(table.batches())
    try:
        resumed.load(saved, held, {})
    except CheckpointError:
        # A fork took away what the checkpoint holds: it cannot be taken back from what is not held.
        assert any(head.forked for head in table.heads())
        return
    come, gone = resumed.difference(table.counting(), held)
    resumed.apply(come, gone)
    assert resumed.learner.digest() == records.learner.digest()
    assert resumed.records == records.records


def test_leaving_any_one_batch_out_is_another_state() -> None:
    packed = signed([Made(author, 0, 0, 1, bytes([60 + author, 3])) for author in (0, 1, 2)])
    table = logs()
    for item in packed:
        table.offer(item)
    batches = list(table.counting())
    states = {state_of(batches), *(state_of([b for b in batches if b is not left]) for left in batches)}
    assert len(states) == 1 + len(batches)


def test_our_own_records_move_us_once_before_and_after_they_count() -> None:
    """Probed one by one, sealed as one batch: when it comes to count, nothing moves any more."""
    records = applied()
    made = [records.take_step(b"l" * 16, number, 7) for number in range(3)]
    assert not records.exact
    before = records.learner.digest()
    batch = Batch(b"n" * 32, b"l" * 16, "me", 1, 0, 0, 7, b"".join(p.records for p in made), None, b"")
    records.apply([batch], [])
    assert records.exact
    assert records.learner.digest() == before == state_of([batch])
    assert records.records == 3


def test_what_another_life_of_ours_made_in_the_place_of_ours_wins() -> None:
    records = applied()
    fresh = records.learner.digest()
    records.take_step(b"l" * 16, 0, 7)
    batch = Batch(b"n" * 32, b"l" * 16, "me", 1, 0, 0, 7, b"\x11\x12", None, b"")
    records.apply([batch], [])
    assert records.exact
    assert records.learner.digest() == state_of([batch]) != fresh


def test_our_own_records_under_another_clock_move_us_as_they_move_everybody() -> None:
    records = applied()
    records.take_step(b"l" * 16, 0, 4)
    ours = records._ahead[0].records
    batch = Batch(b"n" * 32, b"l" * 16, "me", 1, 0, 0, 5, ours, None, b"")
    records.apply([batch], [])
    assert records.exact
    assert records.learner.digest() == state_of([batch])


def test_influence_is_the_share_in_what_moved_the_weights() -> None:
    records = applied()
    for author, byte in (("loud", 0x7F), ("quiet", 0x6F)):
        records.apply(
            [Batch(author.encode(), author.encode(), author, 1, 0, 0, 0, bytes([byte]), None, b"")], []
        )
    assert records.influence_of("loud") == pytest.approx(2 / 3)
    assert records.influence_of("quiet") == pytest.approx(1 / 3)
    assert records.influence_of("nobody") == 0
    assert records.records_of("quiet") == 1


@pytest.mark.parametrize("damage", ["cut short", "another state", "places"])
def test_a_checkpoint_that_is_not_whole_is_refused(damage: str) -> None:
    records = applied()
    batch = Batch(b"n" * 32, b"l" * 16, "me", 1, 0, 0, 7, b"\x11\x12", None, b"")
    records.apply([batch], [])
    saved = records.save()
    fresh = applied()
    before = fresh.learner.digest()
    held = [batch]
    match damage:
        case "cut short":
            saved = saved[:-1]
        case "another state":
            saved = saved.replace(b"one-byte-1", b"one-byte-9")
        case "places":
            held = []
    with pytest.raises(CheckpointError):
        fresh.load(saved, held, {})
    assert fresh.learner.digest() == before
