"""What a swarm does unless it is told otherwise.

Owns the run spec of ``gossamer testnet up`` and of ``gossamer train new``. All begin alike, train by themselves, and
merge every few steps, five times as rarely in the second half: what each has learned travels as a difference from the
last merge, and the average of these differences moves everybody, with a momentum that young models are spared (DiLoCo,
arXiv 2311.08105).
"""

from __future__ import annotations

from training.run_spec import RunSpec
from training.spec_sections import AdamWSpec, ExchangeSpec, NesterovSpec, ScheduleSpec

EVERY_STEPS = 8
"""In the first half. With 4-bit differences that is about 90 times fewer bytes over a run than data-parallel training
sends, and 220 times fewer in the second half."""


def default_run(name: str) -> RunSpec:
    """The spec of a new run called ``name``."""
    return RunSpec(
        name=name,
        init="shared",
        optimizer=AdamWSpec(learning_rate=3e-3, beta2=0.99),
        schedule=ScheduleSpec(preset="early-dense"),
        exchange=ExchangeSpec(every_steps=EVERY_STEPS),
        outer=NesterovSpec(rate=0.7, momentum=0.8, warmup=0.3, wire="e3m0"),
    )
