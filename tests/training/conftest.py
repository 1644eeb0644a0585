"""Shared by the training tests: one thread, tiny runs on text and on labels, and the data for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings

from training.data import Corpus
from training.labelled import Examples, LabelledData
from training.run_spec import RunSpec, parse_run_spec, run_id
from training.spec_sections import MlpSpec
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

TINY_LABELLED = """
name = "tiny-labelled"
[model]
kind = "mlp"
inputs = 6
hidden = [16]
classes = 4
[data]
source = "npz"
[optimizer]
kind = "sgd"
learning_rate = 0.1
weight_decay = 0.01
[train]
steps = 40
batch = 16
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


@pytest.fixture(scope="session")
def labelled() -> LabelledData:
    """Points around four centres, the centre being the label."""
    rng = np.random.default_rng(0)
    y = np.arange(600) % 4
    return LabelledData.of(
        Examples((rng.standard_normal((4, 6))[y] + rng.standard_normal((600, 6)) / 2).astype(np.float32), y)
    )


@pytest.fixture
def spec() -> RunSpec:
    return parse_run_spec(TINY)


@pytest.fixture
def labelled_spec() -> RunSpec:
    return parse_run_spec(TINY_LABELLED)


@pytest.fixture
def make_trainer(corpus: Corpus, labelled: LabelledData) -> Callable[..., Trainer]:
    """A new trainer of a spec, by default for the same peer each time."""

    def make(spec: RunSpec, peer: str = "peer-a") -> Trainer:
        data = labelled if isinstance(spec.model, MlpSpec) else corpus
        return Trainer(spec, data, run=run_id(spec), peer=peer, part=None, device="cpu", threads=1)

    return make


@pytest.fixture
def trainer(make_trainer: Callable[..., Trainer], spec: RunSpec) -> Trainer:
    return make_trainer(spec)
