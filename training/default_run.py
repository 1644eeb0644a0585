"""What a swarm does unless it is told otherwise.

Owns the run spec of ``gossamer testnet up`` and of ``gossamer train new``. All begin alike, train by themselves, and
merge every few steps: what each has learned travels as a difference from the last merge, and the average of these
differences moves everybody, with momentum (DiLoCo, arXiv 2311.08105).
"""

from __future__ import annotations

from training.run_spec import RunSpec
from training.spec_sections import AdamWSpec, ExchangeSpec, NesterovSpec, ScheduleSpec

EVERY_STEPS = 30
"""So rare that merging takes less than 3 % of the time of one core, even of a small model (``benchmarks.overlap``)."""


def default_run(name: str) -> RunSpec:
    """The spec of a new run called ``name``."""
    return RunSpec(
        name=name,
        init="shared",
        optimizer=AdamWSpec(learning_rate=3e-3, beta2=0.99),
        schedule=ScheduleSpec(preset="every"),
        exchange=ExchangeSpec(every_steps=EVERY_STEPS),
        outer=NesterovSpec(rate=0.7, momentum=0.5, wire="e3m0"),
    )
