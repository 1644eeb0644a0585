"""Wherever between two checkpoints a process is cancelled, killed or told to stop: nothing of it is left, all go on.

Nor does it matter where between them a time limit within a process is up.
"""

from unittest.mock import patch

import pytest
import trio

from netsim.world import World
from node.gossip_node import GossipNode
from tests.sim.deaths import VERBS, Death, Story, live, with_patience_lost

SAMPLED = 24
"""Of each way to end; ``slow`` tries every step there is."""


@pytest.fixture(scope="module")
def undisturbed() -> Story:
    return live()


def wrong_at(verb: str, steps: range) -> dict[int, list[str]]:
    """What is wrong after a death before each of ``steps``."""
    stories = {step: live(Death(VERBS[verb], step=step)) for step in steps}
    return {step: story.wrong for step, story in stories.items() if story.wrong}


def test_the_run_in_which_nobody_dies_comes_to_its_end(undisturbed: Story) -> None:
    assert undisturbed.wrong == []
    assert undisturbed.steps > 500


@pytest.mark.parametrize("verb", VERBS)
def test_a_process_can_end_at_any_step(verb: str, undisturbed: Story) -> None:
    stride = undisturbed.steps // SAMPLED
    first = list(VERBS).index(verb) * stride // len(VERBS)
    assert wrong_at(verb, range(first, undisturbed.steps, stride)) == {}


def test_a_time_limit_can_be_up_at_any_step(undisturbed: Story) -> None:
    stories = {step: with_patience_lost(step) for step in range(0, undisturbed.steps, 16)}
    assert {step: story.wrong for step, story in stories.items() if story.wrong} == {}
    assert sum(story.limits for story in stories.values()) > 10, "not every step is within a limit"


def test_a_task_that_does_not_end_is_found() -> None:
    async def beat_on(node: GossipNode) -> None:
        while True:
            with trio.CancelScope(shield=True):
                await trio.sleep(1.0)
            await trio.lowlevel.checkpoint()

    with patch.object(GossipNode, "_beat", beat_on):
        wrong = live(Death(World.kill, step=100)).wrong
    assert any("beat_on lives on" in what for what in wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", VERBS)
def test_a_process_can_end_at_every_step(verb: str, undisturbed: Story) -> None:
    assert wrong_at(verb, range(undisturbed.steps)) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_time_limit_can_be_up_at_every_step(undisturbed: Story) -> None:
    stories = {step: with_patience_lost(step) for step in range(undisturbed.steps)}
    assert {step: story.wrong for step, story in stories.items() if story.wrong} == {}
