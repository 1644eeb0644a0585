"""What the machines of one world share that machines in life cannot: what is worked out of a notice.

A heartbeat reaches every member, and each opens the same bytes, encodes the same claim to verify its signature and
decodes the same body. These are pure functions, and what they give is immutable, so a simulation does it once: a
thousand members would otherwise hold a million heartbeats. All else that is received is decoded by everyone who
receives it, and every notice is checked, its signature included, by everyone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from gossip import notices

NOTICES_KEPT = 1 << 14
"""Notices of which is remembered what they gave; what is in use lasts longer, in the tables that hold it."""
SHARED = ("_open", "_claim_of", "_read")


@contextlib.contextmanager
def notices_worked_out_once() -> Iterator[None]:
    """Within the block, equal notices are one object, and so are their claims and bodies."""
    names = vars(notices)
    honest = {name: names[name] for name in SHARED}
    names.update({name: functools.lru_cache(maxsize=NOTICES_KEPT)(honest[name]) for name in SHARED})
    try:
        yield
    finally:
        names.update(honest)
