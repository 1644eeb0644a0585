"""How long a merge waits: deadlines that follow what has been observed, between named bounds.

Owns the arithmetic of deadlines; time is passed in, waiting is done by ``gossip.merging``. Before anything has
been observed a wait is the bound itself, or what the bytes to be moved need at ``merge_bytes_per_s_min``.
"""

from __future__ import annotations

from collections import deque

from p2p.limits import Limits

SLACK = 4.0
"""A wait is this many times the longest of the last observations."""
OBSERVATIONS_KEPT = 16
CALL_FLOOR_S = 3.0
"""Patience with a slow member is worth seconds: who is left out of a merge loses the steps since its last."""
TRANSFER_FLOOR_S = 3.0


class MergePace:
    """Observed durations of calls and transfers, and the deadlines that follow from them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._calls_s: deque[float] = deque(maxlen=OBSERVATIONS_KEPT)
        self._transfers_s: deque[float] = deque(maxlen=OBSERVATIONS_KEPT)

    def called(self, duration_s: float) -> None:
        """A call was answered after ``duration_s``, here or elsewhere."""
        self._calls_s.append(duration_s)

    def transferred(self, duration_s: float) -> None:
        """A transfer (an owner's sums, a member's results) was done after ``duration_s``, here or elsewhere."""
        self._transfers_s.append(duration_s)

    def missed(self) -> None:
        """A wait ended without what was waited for: the observations were too good to be true."""
        self._calls_s.clear()
        self._transfers_s.clear()

    def call_s(self) -> float:
        """How long to wait for promises and contributions."""
        cap_s = self._limits.merge_call_timeout_s
        return min(cap_s, max(CALL_FLOOR_S, SLACK * max(self._calls_s))) if self._calls_s else cap_s

    def transfer_s(self, model_bytes: int) -> float:
        """How long to wait for the owners' sums, or for acknowledgements, of a model of ``model_bytes``."""
        cap_s = min(
            self._limits.merge_transfer_timeout_s,
            TRANSFER_FLOOR_S + 2 * model_bytes / self._limits.merge_bytes_per_s_min,
        )
        return (
            min(cap_s, max(TRANSFER_FLOOR_S, SLACK * max(self._transfers_s))) if self._transfers_s else cap_s
        )

    def patience_s(self, model_bytes: int) -> float:
        """How long a proposer that is alive may stay silent between its call and its record."""
        return self.call_s() + 2 * self.transfer_s(model_bytes)

    def retry_s(self, failures: int) -> float:
        """The pause of a proposer after ``failures`` attempts in a row, at least 1, that came to nothing."""
        pause_s = self._limits.merge_turn_s * 2.0 ** min(failures - 1, 16) / 2
        return min(self._limits.merge_retry_s_max, pause_s)
