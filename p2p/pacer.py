"""A rate that several transfers share. Owns when the next may begin; never moves a byte."""

from __future__ import annotations

import trio


class Pacer:
    """Spaces out transfers so that together they stay below ``bytes_per_s_max``; shared by all it shall bind.

    Work may start once everything started before it would be done at exactly the rate.
    """

    def __init__(self, bytes_per_s_max: float) -> None:
        self._seconds_per_byte = 1.0 / bytes_per_s_max
        self._free_s = 0.0

    def delay_s(self) -> float:
        """Seconds until the next transfer may start; 0 when it may start now."""
        return max(0.0, self._free_s - trio.current_time())

    def spend(self, size: int) -> float:
        """Start a transfer of ``size`` bytes; returns when it may begin, on trio's clock."""
        begin_s = max(self._free_s, trio.current_time())
        self._free_s = begin_s + size * self._seconds_per_byte
        return begin_s

    async def wait_to_spend(self, size: int) -> None:
        """Queue up for ``size`` bytes."""
        await trio.sleep_until(self.spend(size))
