"""Shared by all tests: quiet logs. A test that cares what is logged captures it with structlog.testing."""

import logging

import structlog

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
