"""What the machines of a scenario learn: an analytic quadratic, or the run's own model on real data.

Owns which of these a scenario asks for, and which part of the data each machine has. Data is loaded once for all
machines of a process; machines that join later share the parts of the first ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from netsim.draw import generator
from netsim.labelled_data import dealt, digits, preferring
from netsim.quadratic import Quadratic, QuadraticProblem
from netsim.registry import ScenarioError
from netsim.scenario import LearnerSpec, Scenario
from netsim.world import LearnerFactory, Machine, text_learners
from training.data import Corpus
from training.labelled import LabelledData
from training.learner import Learner
from training.run_spec import RunSpec, run_id
from training.spec_sections import MlpSpec
from training.trainer import Trainer


def learners(scenario: Scenario, seed: int) -> LearnerFactory:
    """The factory of ``scenario``. Raises GossamerError when its data is not to be had, or is of another kind."""
    learner, model = scenario.learner, scenario.run.model
    if learner.kind == "quadratic":
        _no_data(learner)
        return _quadratics(scenario)
    if isinstance(model, MlpSpec):
        return _labelled_learners(scenario.run, _parts(scenario, model, seed))
    _no_data(learner)
    return text_learners(scenario.run, _standard_library(), machines=scenario.nodes)


def _quadratics(scenario: Scenario) -> LearnerFactory:
    learner, spec = scenario.learner, scenario.run
    problem = QuadraticProblem(
        dimension=learner.dimension,
        noise=learner.noise,
        heterogeneity=learner.heterogeneity,
        learning_rate=learner.learning_rate,
    )
    run = run_id(spec)

    def build(machine: Machine) -> Learner:
        part = (machine.number + 1, scenario.nodes)
        return Quadratic(spec, problem, run=run, peer=machine.peer, part=part)

    return build


def _labelled_learners(spec: RunSpec, parts: Sequence[LabelledData]) -> LearnerFactory:
    run = run_id(spec)

    def build(machine: Machine) -> Learner:
        data = parts[machine.number % len(parts)]
        return Trainer(spec, data, run=run, peer=machine.peer, part=None, device="cpu", threads=1)

    return build


def _parts(scenario: Scenario, model: MlpSpec, seed: int) -> list[LabelledData]:
    """The labelled data of each machine."""
    learner = scenario.learner
    if learner.dataset != "digits":
        raise ScenarioError(
            f"cannot run the scenario {scenario.name}: learner.dataset says nothing",
            why="machines with a model of kind mlp learn from labelled examples",
            fix="--set learner.dataset=digits",
        )
    data = digits()
    features, classes = data.train.x.shape[1], int(data.train.y.max()) + 1
    if (model.inputs, model.classes) != (features, classes):
        raise ScenarioError(
            f"cannot run the scenario {scenario.name}: its model has {model.inputs} inputs and {model.classes} classes",
            why=f"{learner.dataset} have {features} features and {classes} classes",
            fix=f"--set run.model.inputs={features} --set run.model.classes={classes}",
        )
    rng, alpha = generator(seed, "data"), learner.dirichlet or None
    if not learner.resampled:
        return dealt(data, scenario.nodes, alpha=alpha, rng=rng)
    if alpha is None:
        return [data] * scenario.nodes
    return preferring(data, scenario.nodes, alpha=alpha, rng=rng)


def _no_data(learner: LearnerSpec) -> None:
    if learner.dataset:
        raise ScenarioError(
            f"learner.dataset = {learner.dataset} belongs to a model of kind mlp",
            why="a quadratic has no data, and other models learn from text",
            fix="set learner.kind = torch and run.model.kind = mlp, or leave learner.dataset out",
        )


@functools.cache
def _standard_library() -> Corpus:
    return Corpus.load("stdlib", None)
