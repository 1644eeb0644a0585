"""What the machines of a scenario learn: an analytic quadratic, or the run's own model on real data.

Owns how data and problems are dealt out. Data is loaded once for all machines of a process.
"""

from __future__ import annotations

import functools

from netsim.quadratic import Quadratic, QuadraticProblem
from netsim.scenario import Scenario
from netsim.world import LearnerFactory, Machine, text_learners
from training.data import Corpus
from training.learner import Learner
from training.run_spec import run_id


def learners(scenario: Scenario, seed: int) -> LearnerFactory:
    """The factory of ``scenario``. Raises GossamerError when its data is not to be had."""
    if scenario.learner.kind == "quadratic":
        return _quadratics(scenario)
    return text_learners(scenario.run, _standard_library(), machines=scenario.nodes)


def _quadratics(scenario: Scenario) -> LearnerFactory:
    learner, spec = scenario.learner, scenario.run
    problem = QuadraticProblem(
        dimension=learner.dimension, noise=learner.noise, heterogeneity=learner.heterogeneity
    )
    run = run_id(spec)

    def build(machine: Machine) -> Learner:
        part = (machine.number + 1, scenario.nodes)
        return Quadratic(spec, problem, run=run, peer=machine.peer, part=part)

    return build


@functools.cache
def _standard_library() -> Corpus:
    return Corpus.load("stdlib", None)
