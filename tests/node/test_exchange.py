"""An exchange that is due takes place as often as the run says."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from node.exchange import Exchanger
from node.partners import Partners
from node.rounds import Exchange
from p2p.transport import PeerId
from training.run_spec import RunSpec
from training.schedules import Schedule
from training.spec_sections import ExchangeSpec, PhaseSpec


@pytest.mark.parametrize(("probability", "least", "most"), [(1.0, 400, 400), (0.2, 60, 100)])
async def test_a_due_exchange_takes_place_with_the_probability_of_the_run(
    probability: float, least: int, most: int
) -> None:
    asked = 0

    def members() -> list[PeerId]:
        nonlocal asked
        asked += 1
        return []

    unused: Any = SimpleNamespace()
    learner: Any = SimpleNamespace(spec=RunSpec(name="x"))
    exchanger = Exchanger(
        spec=ExchangeSpec(),
        schedule=Schedule((PhaseSpec(until=1.0, probability=probability),), ()),
        trainer=learner,
        compute=unused,
        costs=unused,
        puller=unused,
        rng=random.Random(0),
        partners=Partners("random", rng=random.Random(0), members=members, may_mix_with=lambda peer: True),
        outliers="keep",
        note=unused,
        is_elder=lambda peer: False,
    )
    for step in range(400):
        await exchanger.exchange(Exchange(fragment=0, step=step))
    assert least <= asked <= most
