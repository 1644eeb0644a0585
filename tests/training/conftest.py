"""Shared by the training tests: one thread, a tiny run and a text made of numbered lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from training.data import Corpus
from training.run_spec import RunSpec, parse_run_spec, run_id
from training.trainer import Trainer

# Examples differ in size and the first ones warm torch up: a deadline for each would only measure the machine.
settings.register_profile("training", deadline=None, max_examples=50)
settings.load_profile("training")

TINY = """
name = "tiny"
[model]
layers = 2
width = 16
heads = 2
context = 16
[train]
steps = 40
batch = 4
[exchange]
fragments = 2
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus.of(
        [b"".join(b"file %d line %d\n" % (file, line) for line in range(200)) for file in range(40)]
    )


@pytest.fixture
def spec() -> RunSpec:
    return parse_run_spec(TINY)


@pytest.fixture
def make_trainer(corpus: Corpus) -> Callable[..., Trainer]:
    """A new trainer of a spec, by default for the same peer each time."""

    def make(spec: RunSpec, peer: str = "peer-a") -> Trainer:
        return Trainer(spec, corpus, run=run_id(spec), peer=peer, part=None, device="cpu", threads=1)

    return make


@pytest.fixture
def trainer(make_trainer: Callable[..., Trainer], spec: RunSpec) -> Trainer:
    return make_trainer(spec)
