"""Waits that start anew with every sign of progress, without paying for each of them.

Owns the rule when a deadline is worth moving. Moving one costs trio a push on its heap of deadlines now and a pop when
the old one passes, about as much as moving a small frame, and a transfer makes thousands of steps a second.
"""

from __future__ import annotations

import math

import trio

SLACK = 0.1
"""A wait may end this share of its time early."""


def renew(scope: trio.CancelScope, timeout_s: float, *, latest_s: float = math.inf) -> None:
    """Let ``scope`` wait ``timeout_s`` from now, or up to SLACK less; never beyond ``latest_s`` on trio's clock."""
    deadline_s = min(latest_s, trio.current_time() + timeout_s)
    if deadline_s - scope.deadline > SLACK * timeout_s:
        scope.deadline = deadline_s
