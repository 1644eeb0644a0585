"""What the machines of one world share that machines in life cannot: the decoded bodies of notices.

A heartbeat reaches every member, and each decodes the same bytes. Decoding is a pure function and what it gives is
immutable, so a simulation does it once: a thousand members would otherwise hold a million heartbeats. All else that is
received is decoded by everyone who receives it, and every notice is checked by everyone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from gossip import notices

BODIES_KEPT = 1 << 16
"""Bodies remembered; those in use last longer, in the tables that hold them."""


@contextlib.contextmanager
def bodies_decoded_once() -> Iterator[None]:
    """Within the block, equal bodies of notices are one object."""
    names = vars(notices)
    decode = names["decode"]
    names["decode"] = functools.lru_cache(maxsize=BODIES_KEPT)(decode)
    try:
        yield
    finally:
        names["decode"] = decode
