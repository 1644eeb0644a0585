"""Whom a node connects with at all: its allow-list, and what is told of those who were turned away.

Owns the list, the count of refusals by reason, and how often the log tells of them. Closes nothing: a transport asks
once it knows who a peer is. Strangers can provoke what is told here, so each reason gets one line in LOG_PAUSE_S.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection
from typing import Literal

import trio

from p2p.transport import PeerId

LOG_PAUSE_S = 60.0
DETAIL_CHARS_MAX = 300

Reason = Literal["swarm-key", "not-allowed"]
"""``swarm-key``: who dialled has not proved the key of our private swarm. ``not-allowed``: it is not on our list."""

_log = logging.getLogger(__name__)


class ConnectionGater:
    """``allowed``: the peers that may be connected; none named means all."""

    def __init__(self, allowed: Collection[PeerId] = ()) -> None:
        self._allowed = frozenset(allowed)
        self._said_s: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        """Connections that others made and were refused, by Reason, since the start."""

    def allows(self, peer: PeerId) -> bool:
        """Whether a connection with ``peer`` may be."""
        return not self._allowed or peer in self._allowed

    def refuse(self, reason: Reason, detail: str) -> None:
        """Count and tell that somebody was turned away."""
        self.refusals[reason] += 1
        self.tell(logging.WARNING, reason, detail)

    def tell(self, level: int, topic: str, detail: str) -> None:
        """Log ``detail``, unless there was a line about ``topic``, one of a few names, in the last LOG_PAUSE_S."""
        now_s = trio.current_time()
        if now_s - self._said_s.get(topic, -math.inf) < LOG_PAUSE_S:
            self._unsaid[topic] += 1
            return
        self._said_s[topic] = now_s
        more = self._unsaid.pop(topic, 0)
        _log.log(
            level,
            "%s: %s%s",
            topic,
            detail[:DETAIL_CHARS_MAX],
            f" ({more} more like this before)" if more else "",
        )
