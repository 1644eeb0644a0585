"""What computing costs in virtual seconds, where the seam cannot measure it. Ignored outside netsim."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Virtual seconds charged per call; a scenario sets them per node to model its hardware."""

    step_s: float = 0.025
    copy_s: float = 0.001
    mix_s: float = 0.005
    evaluate_s: float = 0.5
