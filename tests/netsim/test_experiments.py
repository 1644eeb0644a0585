"""The experiments show in miniature what was published, and their criteria can tell when results do not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from netsim.experiments import CRITERIA, Verdict
from netsim.experiments.mixing_rates import lockstep_rho, staggered_rho
from netsim.experiments.verdict import Results
from netsim.feasible import check_scenario
from netsim.registry import builtin_names, load_scenario, small_form, variant_of
from netsim.results import SeedResult
from netsim.runner import run_seed

PAPERS = [name for name in builtin_names() if name.startswith("paper/")]


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.timeout(400)
def test_the_small_form_shows_what_was_published(name: str) -> None:
    small = small_form(load_scenario(name))
    assert small.experiment is not None
    results = [
        run_seed(variant_of(small, variant.name), seed, variant=variant.name, emit=lambda line: None)
        for variant in small.experiment.variants
        for seed in range(small.experiment.seeds)
    ]
    assert [result.failures for result in results] == [[]] * len(results)
    verdict = CRITERIA[small.experiment.criterion](results)
    assert verdict.passed, verdict.sentence


def test_there_is_an_experiment_for_each_criterion() -> None:
    found = [load_scenario(name) for name in PAPERS]
    assert {scenario.experiment.criterion for scenario in found if scenario.experiment} == CRITERIA.keys()
    for scenario in found:
        check_scenario(scenario)


# --- criteria -----------------------------------------------------------------------------------------------------


def made_up(figures: Mapping[str, Mapping[str, float]], seeds: int = 2) -> list[SeedResult]:
    """Results that are alike in all seeds, by variant."""
    return [
        SeedResult(
            seed=seed,
            variant=variant,
            verdict="passed",
            failures=[],
            drawn={},
            trace="",
            virtual_s=1.0,
            wall_s=1.0,
            deliveries=1,
            summary=dict(summary),
        )
        for variant, summary in figures.items()
        for seed in range(seeds)
    ]


def judged(criterion: str, figures: Mapping[str, Mapping[str, float]]) -> Verdict:
    verdict = CRITERIA[criterion](made_up(figures))
    assert len({len(row) for row in verdict.table}) == 1
    return verdict


def variance(steps: float = math.nan, *, ratio: float = 1.0, accuracy: float = 0.9) -> dict[str, float]:
    return {"steps_to_80": steps, "variance_ratio_min": ratio, "local_accuracy": accuracy}


VARIANCE = {
    "depth=6 none": variance(40),
    "depth=6 mean": variance(ratio=0.07, accuracy=0.1),
    "depth=6 corrected": variance(42),
    "depth=6 ring mean": variance(ratio=0.07, accuracy=0.1),
    "depth=6 ring corrected": variance(42),
    "depth=6 same-start mean": variance(30),
    "depth=6 same-start corrected": variance(30),
}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"depth=6 mean": variance(90)}, False),
        ({"depth=6 mean": variance(ratio=0.9)}, False),
        ({"depth=6 corrected": variance(60)}, False),
        ({"depth=6 corrected": variance(ratio=0.9, accuracy=0.7)}, False),
        ({"depth=6 corrected": variance(40, ratio=0.5)}, False),
        ({"depth=6 ring corrected": variance(60)}, False),
        ({"depth=6 same-start corrected": variance(30, accuracy=0.8)}, False),
        ({"depth=2 mean": variance(60), "depth=2 corrected": variance(60)}, True),
        (
            {
                "depth=6 dirichlet none": variance(accuracy=0.5),
                "depth=6 dirichlet mean": variance(ratio=0.1, accuracy=0.1),
                "depth=6 dirichlet corrected": variance(100),
            },
            True,
        ),
    ],
)
def test_vanishing_variance(changes: dict[str, dict[str, float]], shown: bool) -> None:
    assert judged("vanishing-variance", VARIANCE | changes).passed is shown


def test_a_seed_in_which_corrected_mixing_never_gets_there_is_not_overlooked() -> None:
    good = made_up(VARIANCE)
    place = next(place for place, result in enumerate(good) if result.variant == "depth=6 corrected")
    lame = [*good]
    lame[place] = msgspec.structs.replace(good[place], summary=variance(accuracy=0.5))
    assert CRITERIA["vanishing-variance"](good).passed
    assert not CRITERIA["vanishing-variance"](lame).passed


def merged(
    local: float, after: float, *, foretold: float | None = None, commits: int = 1
) -> dict[str, float]:
    return {
        "local_accuracy": local,
        "merged_accuracy": after if foretold is None else foretold,
        "final_accuracy": after,
        "commits": commits,
        "mixes_per_node": 10,
    }


MERGED = {
    "start=own p=0": merged(0.5, 0.1),
    "start=own p=0.05": merged(0.7, 0.93),
    "start=own p=1": merged(0.94, 0.96),
    "start=shared p=0": merged(0.9, 0.6),
}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"start=own p=0": merged(0.5, 0.6)}, False),
        ({"start=own p=0.05": merged(0.5, 0.8)}, False),
        ({"start=own p=0.05": merged(0.92, 0.93)}, False),
        ({"start=own p=1": merged(0.96, 0.95)}, False),
        ({"start=own p=1": merged(0.9, 0.96, foretold=0.9)}, False),
        ({"start=own p=1": merged(0.9, 0.96, commits=0)}, False),
    ],
)
def test_mergeability(changes: dict[str, dict[str, float]], shown: bool) -> None:
    assert judged("mergeability", MERGED | changes).passed is shown


def test_mergeability_needs_both_sides_of_the_switch() -> None:
    assert not judged("mergeability", {"start=own p=0": MERGED["start=own p=0"]}).passed
    assert not judged("mergeability", {"start=own p=1": MERGED["start=own p=1"]}).passed


def survivors(accuracy: float) -> dict[str, float]:
    return {"local_accuracy": accuracy}


DISRUPTED = {
    "even barabasi-albert none": survivors(0.94),
    "even barabasi-albert random": survivors(0.935),
    "even barabasi-albert hubs": survivors(0.9),
    "even k-regular none": survivors(0.95),
    "even k-regular random": survivors(0.945),
}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"even barabasi-albert hubs": survivors(0.935)}, False),
        ({"even barabasi-albert random": survivors(0.89)}, False),
        ({"even k-regular random": survivors(0.92)}, False),
        ({"even barabasi-albert hubs": survivors(0.3)}, False),
        ({"even full none": survivors(0.95), "even full random": survivors(0.9)}, False),
        (
            {"uneven barabasi-albert none": survivors(0.9), "uneven barabasi-albert hubs": survivors(0.9)},
            False,
        ),
    ],
)
def test_disruption(changes: dict[str, dict[str, float]], shown: bool) -> None:
    assert judged("disruption", DISRUPTED | changes).passed is shown


def mixing(rho: float, drift: float = 0.7) -> dict[str, float]:
    return {"contraction": rho, "mean_drift": drift}


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        (
            {
                "n=8 s=1 lockstep": mixing(lockstep_rho(8, 1)),
                "n=8 s=2 staggered": mixing(staggered_rho(8, 2)),
            },
            True,
        ),
        ({"n=8 s=1 lockstep": mixing(staggered_rho(8, 1))}, False),
        ({"n=8 s=1 lockstep": mixing(1.1 * lockstep_rho(8, 1))}, False),
        ({"n=8 s=1 lockstep": mixing(lockstep_rho(8, 1), drift=3.0)}, False),
        ({"n=8 s=1 lockstep": {}}, False),
    ],
)
def test_mixing_rates(
    figures: dict[str, dict[str, float]], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netsim.experiments.mixing_rates.RESEARCH_ROUNDS", 2)
    monkeypatch.setattr("netsim.experiments.mixing_rates.RESEARCH_SEEDS", 1)
    verdict = judged("mixing-rates", figures)
    assert verdict.passed is shown
    assert "random pull s=4" in {row[1] for row in verdict.table}


def test_nothing_is_shown_by_no_results() -> None:
    assert not any(criterion([]).passed for criterion in CRITERIA.values())


# --- theory -------------------------------------------------------------------------------------------------------


def test_staggered_mixing_by_theory_is_that_of_vectors_mixed_one_after_the_other() -> None:
    members, s, rounds = 10, 3, 4
    generator = np.random.default_rng(5)
    ratios = []
    for _ in range(200):
        values = generator.normal(size=(members, 16))
        first = np.square(values - values.mean(axis=0)).sum()
        for _ in range(rounds):
            for member in range(members):
                others = np.delete(np.arange(members), member)
                chosen = generator.choice(others, s, replace=False)
                values[member] = values[[member, *chosen]].mean(axis=0)
        ratios.append(np.square(values - values.mean(axis=0)).sum() / first)
    assert np.mean(ratios) ** (1 / (2 * rounds)) == pytest.approx(staggered_rho(members, s, rounds), rel=0.03)


def test_staggered_mixing_leaves_less_than_lockstep() -> None:
    for members in (8, 16, 64):
        for s in (1, 4):
            assert staggered_rho(members, s) < 0.95 * lockstep_rho(members, s)


def test_spreads_say_when_there_is_nothing_to_tell() -> None:
    assert Results([]).spread("any", "final_loss") == "-"
