"""Wherever in a disk operation the power goes: what was promised holds, the disk loads, the next merge has everybody.

The operations counted are those of the machine's first life, from the start of its process to its last checkpoint; of
some of those power cuts the recovery is cut short by another.
"""

import itertools
from typing import get_args

import pytest

from netsim.injection import Moment
from netsim.world import World
from tests.sim import planted
from tests.sim.deaths import MACHINES, Death, live

MOMENTS: tuple[Moment, ...] = get_args(Moment)
RECOVERY = 10
"""Operations of a second life that are enough to load everything and go on."""


def cut(operation: int, moment: Moment) -> Death:
    """The power goes within one operation of a life."""
    return Death(World.power_cut, operation=operation, moment=moment)


def operations_of(victim: int, seed: int) -> int:
    """How many there are if nobody dies."""
    story = live(victim=victim, seed=seed)
    assert story.wrong == []
    assert story.operations > 20
    return story.operations


def wrong_at(
    points: list[tuple[int, Moment]], *, victim: int, seed: int = 1
) -> dict[tuple[int, Moment], list[str]]:
    """What is wrong after a power cut at each of ``points``."""
    stories = {point: live(cut(*point), victim=victim, seed=seed) for point in points}
    return {point: story.wrong for point, story in stories.items() if story.wrong}


def all_points(operations: int) -> list[tuple[int, Moment]]:
    """Before and after each."""
    return list(itertools.product(range(1, operations + 1), MOMENTS))


def test_the_power_can_go_at_any_operation() -> None:
    assert wrong_at(all_points(operations_of(1, 1))[::3], victim=1) == {}


def test_so_it_can_on_the_first_machine() -> None:
    assert wrong_at(all_points(operations_of(0, 1))[::5], victim=0) == {}


def test_it_can_go_again_while_a_machine_recovers() -> None:
    for first, again in zip(range(4, operations_of(1, 1), 3), itertools.cycle(range(1, RECOVERY + 1))):
        story = live(cut(first, "after"), cut(again, "before"), cut(again, "after"))
        assert story.wrong == [], (first, again)


def test_a_node_that_deletes_its_last_checkpoint_before_it_has_the_next_is_found() -> None:
    """In some worlds: what the power leaves of a deletion that was not synced is drawn."""

    def found(seed: int) -> bool:
        late = all_points(operations_of(1, seed))[-12:]
        return "checkpoint" in str(wrong_at(late, victim=1, seed=seed))

    with planted.old_checkpoints_deleted_first():
        assert any(map(found, range(3, 9)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", range(MACHINES))
@pytest.mark.parametrize("seed", range(1, 5))
def test_the_power_can_go_at_every_operation(victim: int, seed: int) -> None:
    """Seeds differ in what the disk keeps of what was not synced."""
    assert wrong_at(all_points(operations_of(victim, seed)), victim=victim, seed=seed) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_can_go_again_at_every_operation_of_a_recovery() -> None:
    for first in range(1, operations_of(1, 1) + 1):
        for again in range(1, RECOVERY + 1):
            story = live(cut(first, "after"), cut(again, "after"))
            assert story.wrong == [], (first, again)
