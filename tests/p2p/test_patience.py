"""Waits that are renewed: at least nine tenths of what was asked, and never beyond the end of all patience."""

import math

import pytest
import trio
from trio.testing import MockClock

from p2p.patience import SLACK, renew


async def test_a_wait_lasts_from_the_last_sign_of_progress(autojump_clock: MockClock) -> None:
    with trio.move_on_after(10.0) as scope:
        for _ in range(1000):
            await trio.sleep(0.123)
            renew(scope, 10.0)
            assert (1 - SLACK) * 10.0 <= scope.deadline - trio.current_time() <= 10.001
        stopped_s = trio.current_time()
        await trio.sleep(math.inf)
    assert (1 - SLACK) * 10.0 <= trio.current_time() - stopped_s <= 10.001


async def test_progress_does_not_move_the_end_of_all_patience(autojump_clock: MockClock) -> None:
    latest_s = trio.current_time() + 25.0
    with trio.move_on_after(10.0) as scope:
        while True:
            await trio.sleep(0.5)
            renew(scope, 10.0, latest_s=latest_s)
    assert trio.current_time() == pytest.approx(latest_s, abs=SLACK * 10.0)
    assert trio.current_time() <= latest_s + 0.001
