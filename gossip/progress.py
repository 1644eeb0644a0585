"""Progress: how a task that waits for something to get on is woken, whoever got it on."""

from __future__ import annotations

import trio


class Progress:
    """Wakes every task that waits now; who comes later waits for the next time."""

    def __init__(self) -> None:
        self._made = trio.Event()

    def made(self) -> None:
        """Something has changed that others may be waiting for."""
        self._made.set()
        self._made = trio.Event()

    async def wait(self) -> None:
        """Return when something has changed; what exactly is for the caller to look up."""
        await self._made.wait()
