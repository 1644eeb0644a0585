"""The two private switches that make trio repeat itself, in one place.

trio shuffles each batch of runnable tasks with a module-level generator, and breaks ties between equal deadlines
by object identity. Both must be pinned before two runs from one seed are equal. The names are private to trio:
``tests/netsim/test_determinism.py`` fails loudly when they change.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import trio._core._run as scheduler

FLAG, GENERATOR = "_ALLOW_DETERMINISTIC_SCHEDULING", "_r"


@contextlib.contextmanager
def deterministic_scheduling(seed: int) -> Iterator[None]:
    """Within the block, ``trio.run`` schedules tasks as a pure function of ``seed`` and the program."""
    pinned = {FLAG: True, GENERATOR: random.Random(seed)}
    saved = {name: getattr(scheduler, name) for name in pinned}
    for name, value in pinned.items():
        setattr(scheduler, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(scheduler, name, value)
