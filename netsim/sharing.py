"""What the machines of one world share that machines in life cannot: what is worked out of a notice.

A heartbeat reaches every member, and each decodes the same body and encodes the same claim to verify its signature.
Both are pure functions, and what they give is immutable, so a simulation does it once: a thousand members would
otherwise hold a million heartbeats. All else that is received is decoded by everyone who receives it, and every notice
is checked, its signature included, by everyone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from gossip import notices

NOTICES_KEPT = 1 << 14
"""Notices whose claims and bodies are remembered; bodies in use last longer, in the tables that hold them."""
SHARED = ("decode", "_claim_of")


@contextlib.contextmanager
def notices_worked_out_once() -> Iterator[None]:
    """Within the block, equal bodies of notices are one object, and so are equal claims."""
    names = vars(notices)
    honest = {name: names[name] for name in SHARED}
    names.update({name: functools.lru_cache(maxsize=NOTICES_KEPT)(honest[name]) for name in SHARED})
    try:
        yield
    finally:
        names.update(honest)
