"""Trying several addresses of one peer, each a little after the one before, until one of them works.

Owns the order of the attempts and nothing of what an attempt is (RFC 8305, section 5).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from p2p.errors import GossamerError

STAGGER_S = 0.25
"""Head start of each address over the next one; one that fails sooner gives way at once."""


async def race(
    addresses: Sequence[str], attempt: Callable[[str], Awaitable[None]], *, timeout_s: float
) -> list[tuple[str, Exception]] | None:
    """None as soon as one attempt has returned; otherwise, after ``timeout_s`` at most, those that failed, and how.

    The other attempts are cancelled then. An attempt fails with OSError, ValueError or GossamerError.
    """
    failures: list[tuple[str, Exception]] = []
    won = False

    async def try_one(address: str, failed: trio.Event) -> None:
        nonlocal won
        try:
            await attempt(address)
        except (OSError, ValueError, GossamerError) as error:
            failures.append((address, error))
            failed.set()
        else:
            won = True
            runners.cancel_scope.cancel()

    with trio.move_on_after(timeout_s):
        async with trio.open_nursery() as runners:
            for address in addresses:
                failed = trio.Event()
                runners.start_soon(try_one, address, failed)
                with trio.move_on_after(STAGGER_S):
                    await failed.wait()
    return None if won else failures
