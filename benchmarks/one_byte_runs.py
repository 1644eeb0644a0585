"""The trials of ``benchmarks.one_byte_learning``: a base trained by gossip, then fine-tuned from bytes or from floats.

Owns what decides their figures: both texts, the base, the two ways to fine-tune it, and the digest under which results
may be kept. Never compares or keeps anything.

The base learns the standard library's sources in the simulator: real nodes with the real trainer, different initial
weights, gossip, one global merge at the end. The text to fine-tune on is the list of Unicode's character names, which
those sources are kept free of: English words, but so unlike code that a few hundred records lower the loss by far more
than luck does. On prose, which is closer to it, five seeds could not have told one from the other.

Relies on: ``netsim.world`` for a swarm in gossip mode; a fine-tuning run takes batches that depend on its seed and its
nodes only, so runs of one seed are paired whatever their method and step size.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import msgspec
import torch
import trio
from blake3 import blake3
from msgspec.structs import replace
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kept import code_digest
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.world import open_world
from node.applied_records import AppliedRecords
from training.base_weights import base_to_bytes
from training.byte_code import SIZE_MAX
from training.data import Corpus
from training.evaluation import held_out_loss
from training.export import export_safetensors
from training.one_byte import OneByteLearner, RecordRun, build_one_byte_task
from training.run_spec import RunSpec, canonical_bytes
from training.spec_sections import OneByteSpec

NOT_IN_THE_BASE = {"encodings", "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the standard library that the base learns nothing from. Encodings name characters."""

PAGE_CHARACTERS = 256
NUMBERED = re.compile(r"HANGUL SYLLABLE |.*-[0-9A-F]{4,}\Z")
"""Names that follow from the number of the character: a list of numbers."""

Method = Literal["bytes", "floats"]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One fine-tuning run: ``steps`` minibatches on each of ``nodes`` nodes, evaluated each time after ``every``."""

    method: Method
    nodes: int
    step_size: float
    seed: int
    steps: int
    every: int


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial came to. ``losses[i]`` is held out, in nats per byte, after ``steps[i]`` steps of each node."""

    steps: list[int]
    losses: list[float]
    zero: float = 0.0
    """Share of bytes that say that nothing changed."""
    clipped: float = 0.0
    """Share of bytes that say the largest size there is."""
    state: str = ""
    """The state hash at the end, which every node came to; none without bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What all trials of a comparison share. ``spec`` has everything but the step size."""

    spec: RunSpec
    base: Mapping[str, Tensor]
    text: Corpus

    def with_step_size(self, step_size: float) -> RunSpec:
        """The spec of one trial."""
        assert isinstance(self.spec.one_byte, OneByteSpec)
        return replace(self.spec, one_byte=replace(self.spec.one_byte, step_size=step_size))

    def key(self, trial: Trial) -> str:
        """Equal for trials that must come to the same, with this code."""
        hasher = blake3(canonical_bytes(self.with_step_size(trial.step_size)))
        hasher.update(msgspec.json.encode(trial)).update(code_digest("benchmarks.one_byte_runs"))
        hasher.update(self.text.train.tobytes()).update(self.text.held_out.tobytes())
        hasher.update(base_to_bytes(self.base))
        return hasher.hexdigest(length=16)


# --- texts and base -----------------------------------------------------------------------------------------------


def library_sources() -> Corpus:
    """The standard library's sources, without what they say of the text to fine-tune on."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return Corpus.of(
        [file.read_bytes() for file in files if not NOT_IN_THE_BASE & {*file.relative_to(root).parts}]
    )


def character_names() -> Corpus:
    """The names of Unicode's characters, a line each: a tenth of its pages is held out."""
    pages = []
    for first in range(0, sys.maxunicode + 1, PAGE_CHARACTERS):
        names = (unicodedata.name(chr(point), "") for point in range(first, first + PAGE_CHARACTERS))
        pages.append("".join(f"{name}\n" for name in names if name and not NUMBERED.match(name)))
    return Corpus.of([page.encode() for page in pages if page])


def gossip_base(spec: RunSpec, *, machines: int) -> bytes:
    """What a simulated swarm in gossip mode learned and merged, as ``gossamer export`` writes it."""

    async def swarm() -> bytes:
        async with open_world(spec, library_sources(), machines=machines, seed=spec.seed) as world:
            nodes = await world.start_all()
            for node in nodes:
                await node.wait_finished()
            merged = [await node.weights("anchor") for node in nodes]
            assert len({weights.hash for weights in merged}) == 1, "the nodes hold different merged weights"
            metadata = {"run": nodes[0].run_id.hex(), "weights": merged[0].hash.hex()}
            return export_safetensors(merged[0].tensors, spec, metadata=metadata)

    torch.set_num_threads(1)
    with deterministic_scheduling(spec.seed):
        return trio.run(swarm, clock=SimClock())


# --- fine-tuning --------------------------------------------------------------------------------------------------


def run_trial(setting: Setting, trial: Trial) -> Course:
    """Fine-tune as ``trial`` says."""
    match trial.method:
        case "bytes":
            return _by_bytes(setting, trial)
        case "floats":
            return _by_floats(setting, trial)
        case _:
            assert_never(trial.method)


def _by_bytes(setting: Setting, trial: Trial) -> Course:
    """The product's own learners in lockstep: each probes, its own weights follow, then those of the others do."""
    learners = [_learner(setting, trial, number) for number in range(trial.nodes)]
    nodes = [AppliedRecords(learner) for learner in learners]
    logs = [blake3(f"log {number}".encode()).digest(length=16) for number in range(trial.nodes)]
    steps, losses, made = [0], [learners[0].evaluate()], bytearray()
    for step in range(trial.steps):
        probes = len(made) // trial.nodes
        runs = [
            RecordRun(log, probes, len(made), node.take_step(log, probes, len(made)).records)
            for log, node in zip(logs, nodes, strict=True)
        ]
        for number, learner in enumerate(learners):
            learner.apply([run for run in runs if run.log != logs[number]])
        made += b"".join(run.records for run in runs)
        if (step + 1) % trial.every == 0:
            assert len({learner.digest() for learner in learners}) == 1, "equal records, different states"
            steps.append(step + 1)
            losses.append(learners[0].evaluate())
    sizes = [byte & SIZE_MAX for byte in made]
    return Course(
        steps=steps,
        losses=losses,
        zero=sizes.count(0) / len(sizes),
        clipped=sizes.count(SIZE_MAX) / len(sizes),
        state=learners[0].digest().hex(),
    )


def _learner(setting: Setting, trial: Trial, number: int) -> OneByteLearner:
    spec, run = setting.with_step_size(trial.step_size), _run_of(trial)
    task = build_one_byte_task(
        spec,
        setting.text,
        run=run,
        peer=_peer(number),
        part=(number + 1, trial.nodes),
        device="cpu",
        threads=1,
    )
    return OneByteLearner(spec, task, run=run, base=setting.base)


def _by_floats(setting: Setting, trial: Trial) -> Course:
    """MeZO (arXiv 2305.17333) in fp32, on its own: normal directions, the slope as it is, weights as they come out.

    Of the product it has the model, the minibatches and the measure.
    """
    assert trial.nodes == 1
    task = build_one_byte_task(
        setting.spec,
        setting.text,
        run=_run_of(trial),
        peer=_peer(0),
        part=(1, 1),
        device="cpu",
        threads=1,
    )
    spec = setting.spec.one_byte
    assert isinstance(spec, OneByteSpec)
    parameters = dict(task.model.named_parameters())
    weights = torch.cat([setting.base[name].flatten() for name in parameters])
    place = weights.clone()
    for name, view in _views(parameters, place).items():
        parameters[name].requires_grad_(False)
        parameters[name].data = view
    generator = normals(trial)

    @torch.no_grad()
    def loss_at(direction: Tensor, distance: float) -> float:
        torch.add(weights, direction, alpha=distance, out=place)
        return F.cross_entropy(task.model(inputs).flatten(0, -2), targets.flatten()).item()

    def evaluated() -> float:
        return held_out_loss(task, _views(parameters, weights), None)

    steps, losses = [0], [evaluated()]
    for step in range(trial.steps):
        inputs, targets = task.batch(step)
        moved = torch.zeros_like(weights)
        for _ in range(spec.probes):
            direction = torch.randn(weights.shape, generator=generator)
            slope = (loss_at(direction, spec.epsilon) - loss_at(direction, -spec.epsilon)) / (
                2 * spec.epsilon
            )
            moved.add_(direction, alpha=slope)
        weights.sub_(moved, alpha=trial.step_size)
        if (step + 1) % trial.every == 0:
            steps.append(step + 1)
            losses.append(evaluated())
    return Course(steps=steps, losses=losses)


def normals(trial: Trial) -> torch.Generator:
    """What all normal directions of a trial are drawn from, one after the other.

    Not seeded anew for each of them: of a seed torch uses the low 32 bits on the CPU, so with the number of the step
    there and that of the trial above it, all trials would have the same directions.
    """
    return torch.Generator().manual_seed(int.from_bytes(_run_of(trial)[:4], "little"))


def _views(parameters: Mapping[str, Tensor], flat: Tensor) -> dict[str, Tensor]:
    """The tensors in ``flat``, which has them one after the other."""
    cut = torch.split(flat, [parameter.numel() for parameter in parameters.values()])
    return {
        name: part.view(parameter.shape)
        for (name, parameter), part in zip(parameters.items(), cut, strict=True)
    }


def _run_of(trial: Trial) -> bytes:
    """Decides batches and directions: the seed alone does, so that trials of one seed differ in nothing else."""
    return blake3(f"one-byte learning {trial.seed}".encode()).digest()


def _peer(number: int) -> str:
    return f"node {number}"
