"""The round machine and the merge watch, fed events by hand."""

import pytest

from node.rounds import AwaitFinalMerge, Exchange, Finished, MemberProgress, MergeWatch, Rounds, Train


def rounds(**changes: object) -> Rounds:
    settings: dict = {
        "steps_total": 20,
        "every_steps": 5,
        "fragments": 2,
        "merge_points": [1.0],
        "exchanging": True,
    }
    return Rounds(**{**settings, **changes})


def test_training_runs_to_the_boundary_then_exchanges_fragments_in_turn() -> None:
    machine = rounds()
    exchanges = []
    while isinstance(plan := machine.plan(), Train):
        due = machine.trained(machine.step + plan.steps_max)
        if due is not None:
            exchanges.append(due)
            machine.exchange_ended()
    assert exchanges == [Exchange(1, 5), Exchange(0, 10), Exchange(1, 15)]
    assert isinstance(plan, AwaitFinalMerge)


def test_an_exchange_due_while_one_is_in_flight_is_skipped_and_counted() -> None:
    machine = rounds()
    assert machine.trained(5) is not None
    assert machine.trained(10) is None
    assert machine.exchanges_skipped == 1
    machine.exchange_ended()
    assert machine.trained(15) == Exchange(1, 15)


def test_a_resumed_node_trains_only_what_is_left_of_the_round() -> None:
    machine = rounds()
    machine.resume(7)
    assert machine.plan() == Train(3)


def test_finished_only_after_every_merge_point_is_passed() -> None:
    machine = rounds(merge_points=[0.5, 1.0])
    machine.trained(20)
    machine.merge_committed(1)
    assert isinstance(machine.plan(), AwaitFinalMerge)
    machine.merge_committed(2)
    assert isinstance(machine.plan(), Finished)


def test_a_run_that_does_not_exchange_never_asks_to() -> None:
    machine = rounds(exchanging=False)
    assert machine.trained(5) is None
    assert machine.exchanges_skipped == 0


def progress(*steps: int, speed: float = 10.0) -> list[MemberProgress]:
    return [MemberProgress(step, 100, speed) for step in steps]


@pytest.fixture
def watch() -> MergeWatch:
    return MergeWatch([0.5, 1.0], wait_s_max=30.0)


def test_due_at_once_when_everybody_is_there(watch: MergeWatch) -> None:
    assert not watch.due(0, progress(49, 49), 0.0, others_known=False)
    assert watch.due(0, progress(50, 51), 0.1, others_known=False)
    assert not watch.due(2, progress(100, 100), 0.2, others_known=False)


def test_half_the_swarm_waits_for_the_rest_as_long_as_their_speed_says(watch: MergeWatch) -> None:
    late = progress(50, 50, 50, 10)  # the last needs 4 s at 10 steps/s: patience is 2 + 1.5 * 4 = 8 s
    assert not watch.due(0, late, 100.0, others_known=False)
    assert not watch.due(0, late, 107.9, others_known=False)
    assert watch.due(0, late, 108.0, others_known=False)


def test_one_early_member_waits_for_half_but_not_for_ever(watch: MergeWatch) -> None:
    early = progress(50, 10, 10, 10)
    assert not watch.due(0, early, 100.0, others_known=False)
    assert not watch.due(0, early, 129.9, others_known=False)
    assert watch.due(0, early, 130.0, others_known=False)


def test_members_of_unknown_speed_are_waited_for_up_to_the_cap(watch: MergeWatch) -> None:
    stuck = [*progress(50, 50), MemberProgress(0, 100, 0.0)]
    assert not watch.due(0, stuck, 0.0, others_known=False)
    assert not watch.due(0, stuck, 29.9, others_known=False)
    assert watch.due(0, stuck, 30.0, others_known=False)


def test_a_new_point_starts_a_new_wait(watch: MergeWatch) -> None:
    assert not watch.due(0, progress(50, 10), 0.0, others_known=False)
    assert not watch.due(1, progress(100, 10), 30.0, others_known=False)
    assert watch.due(1, progress(100, 10), 60.0, others_known=False)


def test_a_node_that_sees_nobody_it_knows_of_waits_before_it_merges_alone(watch: MergeWatch) -> None:
    alone = progress(100)
    assert not watch.due(0, alone, 10.0, others_known=True)
    assert not watch.due(0, alone, 39.9, others_known=True)
    assert watch.due(0, alone, 40.0, others_known=True)
    assert watch.due(1, alone, 40.1, others_known=False)
    assert not watch.due(1, alone, 40.2, others_known=True)
    assert watch.due(1, progress(100, 100), 40.3, others_known=True)


def test_a_merge_that_comes_late_passes_all_points_that_most_members_are_beyond() -> None:
    watch = MergeWatch([0.2, 0.4, 0.6, 1.0], wait_s_max=20.0)
    assert watch.passed(0, progress(20, 20, 20)) == 1
    assert watch.passed(0, progress(70, 41, 20)) == 2
    assert watch.passed(0, progress(70, 99, 20)) == 3
    # The last one is for everybody.
    assert watch.passed(1, progress(100, 100, 99)) == 3
    assert watch.passed(1, progress(100, 100, 100)) == 4
    assert watch.passed(3, progress(100, 0, 0)) == 4


@pytest.mark.parametrize(
    ("steps", "pause_s"),
    [
        ([0, 50], MergeWatch.LOOK_S_MAX),
        ([0, 96], 3.0),
        ([99.9, 0], MergeWatch.LOOK_S_MIN),
        ([100, 0], MergeWatch.LOOK_S_WAITING),
        ([100, 99], 0.75),
        ([100, 100], MergeWatch.LOOK_S_WAITING),
    ],
)
def test_nothing_is_looked_at_before_it_can_be_due(steps: list[float], pause_s: float) -> None:
    watch = MergeWatch([1.0], wait_s_max=20.0)
    members = [MemberProgress(step, 100, 1.0) for step in steps]
    assert watch.pause_s(0, members) == pytest.approx(pause_s)
    assert watch.pause_s(1, members) == MergeWatch.LOOK_S_MAX
