"""Shared by all tests: quiet logs, and virtual time. A test that cares what is logged captures it with structlog."""

import logging

import pytest
import structlog

from netsim.determinism import SimClock

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture
def autojump_clock() -> SimClock:
    """Time that jumps when every task is blocked; the simulated network runs on no other."""
    return SimClock()
