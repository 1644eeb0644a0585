"""Shared by all tests: quiet logs, and virtual time. A test that cares what is logged takes ``told``."""

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from netsim.determinism import SimClock

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

Entries = list[MutableMapping[str, Any]]


@pytest.fixture
def autojump_clock() -> SimClock:
    """Time that jumps when every task is blocked; the simulated network runs on no other."""
    return SimClock()


@pytest.fixture
def told() -> Iterator[Entries]:
    """What nodes log, from INFO on."""
    quiet = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    with capture_logs() as entries:
        yield entries
    structlog.configure(**quiet)
