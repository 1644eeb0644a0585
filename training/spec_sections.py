"""The sections of a run spec: what each key means, its bounds and its default.

Owns the schema of every section and what must hold within one. What must hold between sections, and the forms in which
a spec is written and hashed, are ``training.run_spec``'s.

Some sections come in kinds, told apart by one key: ``model.kind``, ``data.source`` and ``optimizer.kind``. A file may
leave that key out and means the default's; the canonical bytes always name it.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from training.stability import nesterov_rate_max, pair_rate_max

PARAMETERS_MAX = 1 << 28
"""Parameters of the largest model: in fp32 one gibibyte, so that every fragment fits into a shard."""

MODEL_FILES_BYTES_MAX = 64 << 20
"""The largest config and tokenizer of a Hugging Face model, together."""

PHASE_MERGES_MAX = 10_000
"""Global merges in one row of the schedule."""

MixingRuleName = Literal["mean", "variance_corrected"]
Wire = Literal["fp32", "bf16", "int8"]
PartnerChoice = Literal["random", "fast"]
Init = Literal["per-peer", "shared"]
Outliers = Literal["leave-out", "keep"]
UpdateWire = Literal["fp32", "bf16", "int8", "e3m0", "top64"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, every key known, every value bounded."""


def _check_size(parameters: int) -> None:
    if parameters > PARAMETERS_MAX:
        raise ValueError(f"{parameters:,} parameters are more than the {PARAMETERS_MAX:,} allowed")


class GptSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="gpt"):
    """A byte-level GPT (``training.model``), which learns from text."""

    vocab: Literal[256] = 256
    """Tokens are bytes."""
    layers: Annotated[int, Meta(ge=1, le=128)] = 6
    width: Annotated[int, Meta(ge=8, le=8192)] = 144
    heads: Annotated[int, Meta(ge=1, le=128)] = 4
    context: Annotated[int, Meta(ge=8, le=65536)] = 128
    """Bytes the model sees at once."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, and {self.width} is not one of {self.heads}"
            )
        _check_size(self.parameters)

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied tensors counted once."""
        block = 12 * self.width**2 + 2 * self.width
        return self.layers * block + (self.vocab + self.context + 1) * self.width


class MlpSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="mlp"):
    """A multi-layer perceptron (``training.mlp``), which learns to tell the classes of labelled examples apart."""

    inputs: Annotated[int, Meta(ge=1, le=65536)]
    """Features of an example."""
    hidden: Annotated[tuple[Annotated[int, Meta(ge=1, le=8192)], ...], Meta(max_length=127)] = (100,)
    """Widths of the layers between features and classes."""
    classes: Annotated[int, Meta(ge=2, le=65536)]
    activation: Literal["relu", "tanh"] = "relu"

    def __post_init__(self) -> None:
        _check_size(self.parameters)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all layers, the inputs and the classes among them."""
        return (self.inputs, *self.hidden, self.classes)

    @property
    def layers(self) -> int:
        """Layers that have weights."""
        return len(self.hidden) + 1

    @property
    def parameters(self) -> int:
        """Weights and biases of the model."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(self.widths))


class HuggingFaceSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="huggingface"):
    """A causal language model of the library transformers (``training.huggingface``), which learns from text.

    What the model is belongs to the base, which ``--base DIRECTORY`` names and these hashes stand for: a file leaves
    all but ``context`` out.
    """

    files: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Root of the shard of its config and tokenizer, hex."""
    files_bytes: Annotated[int, Meta(ge=0, le=MODEL_FILES_BYTES_MAX)] = 0
    """Size of that shard."""
    parameters: Annotated[int, Meta(ge=0, le=PARAMETERS_MAX)] = 0
    """Parameters of the model, tied tensors counted once."""
    context: Annotated[int, Meta(ge=8, le=65536)] = 128
    """Tokens the model sees at once."""

    def __post_init__(self) -> None:
        if not bool(self.files) == bool(self.files_bytes) == bool(self.parameters):
            raise ValueError("files, files_bytes and parameters belong together: gossamer fills them in")

    @property
    def layers(self) -> int:
        """Groups of tensors that fragments may be made of."""
        return 1


ModelSpec: TypeAlias = GptSpec | MlpSpec | HuggingFaceSpec


class _TextSpec(Section, frozen=True, kw_only=True, tag_field="source"):
    held_out_bytes: Annotated[int, Meta(ge=4096, le=16 << 20)] = 256 << 10
    """Held-out text that an evaluation reads, at most."""


class StdlibDataSpec(_TextSpec, frozen=True, kw_only=True, tag="stdlib"):
    """The Python standard library's own sources (``training.data``)."""


class TextDataSpec(_TextSpec, frozen=True, kw_only=True, tag="text"):
    """Text files that each node names for itself (``training.data``)."""


class NpzDataSpec(Section, frozen=True, kw_only=True, tag_field="source", tag="npz"):
    """Labelled examples in an .npz file that each node names for itself (``training.labelled``)."""

    held_out_examples: Annotated[int, Meta(ge=1, le=1 << 20)] = 10_000
    """Held-out examples that an evaluation reads, at most."""


DataSpec: TypeAlias = StdlibDataSpec | TextDataSpec | NpzDataSpec

LearningRate: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
Steps: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
ClipNorm: TypeAlias = Annotated[float, Meta(gt=0, le=1000)]
Fraction: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Memory: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]


class AdamWSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="adamw"):
    """AdamW with linear warm-up and cosine decay, the gradient clipped by its global norm."""

    learning_rate: LearningRate = 2e-3
    """The peak, reached after the warm-up."""
    warmup_steps: Steps = 20
    weight_decay: Decay = 0.1
    """On weights and embeddings only."""
    beta1: Memory = 0.9
    beta2: Memory = 0.95
    clip_norm: ClipNorm = 1.0
    min_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a fraction of the peak."""


class SgdSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="sgd"):
    """Stochastic gradient descent with momentum, under the same schedule and clipping as AdamW.

    ``warmup_steps = 0`` and ``min_rate_fraction = 1`` keep the rate constant.
    """

    learning_rate: LearningRate = 0.05
    """The peak, reached after the warm-up."""
    warmup_steps: Steps = 0
    momentum: Memory = 0.9
    weight_decay: Decay = 0.0
    """On weights and embeddings only, and of the weights themselves, not by way of the momentum, as in AdamW."""
    clip_norm: ClipNorm = 1.0
    min_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a fraction of the peak."""


OptimizerSpec: TypeAlias = AdamWSpec | SgdSpec


class TrainSpec(Section, frozen=True):
    """How long and how much at a time."""

    steps: Annotated[int, Meta(ge=1, le=100_000_000)] = 600
    """Inner steps of each node."""
    batch: Annotated[int, Meta(ge=1, le=65536)] = 8
    """Sequences, or labelled examples, in a step."""
    precision: Literal["auto", "fp32"] = "auto"
    """``auto``: bf16 autocast on CUDA, fp32 elsewhere."""


class ExchangeSpec(Section, frozen=True):
    """What an exchange is, and by which rule members mix; when it takes place is the schedule's."""

    every_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 5
    """Inner steps between exchanges (H)."""
    fragments: Annotated[int, Meta(ge=1, le=128)] = 1
    """Parts the model is cut into; an exchange moves one of them (S)."""
    partners: PartnerChoice = "random"
    """``fast``: of two random members, the one from which pulls took less time."""
    rule: MixingRuleName = "variance_corrected"
    wire: Wire = "fp32"


class PhaseSpec(Section, frozen=True):
    """A row of the schedule: what holds until a progress."""

    until: Annotated[float, Meta(gt=0, le=1)]
    """Progress, as a fraction of ``train.steps``, at which the next row begins."""
    probability: Fraction = 1.0
    """The chance that an exchange which is due takes place."""
    peers: Annotated[int, Meta(ge=1, le=64)] = 1
    """Members pulled from in an exchange (s)."""
    merges: Annotated[int, Meta(ge=0, le=PHASE_MERGES_MAX)] = 0
    """Global merges, evenly spaced, the last one at the end of the phase."""


SchedulePreset = Literal["constant", "early-dense", "late-heavy", "window", "final-only", "every", "custom"]


class ScheduleSpec(Section, frozen=True):
    """When members exchange and when all merge (``training.schedules``)."""

    preset: SchedulePreset = "constant"
    """``custom``: what ``phases`` say."""
    phases: Annotated[tuple[PhaseSpec, ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        if bool(self.phases) != (self.preset == "custom"):
            raise ValueError('phases are for preset = "custom", and that needs them')
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or (ends and ends[-1] != 1.0):
            raise ValueError("phases must ascend, and the last one last until = 1.0")


class MergeSpec(Section, frozen=True):
    """How all members average, and how long they wait for each other."""

    replicas: Annotated[int, Meta(ge=1, le=16)] = 1
    """Members that sum each fragment independently."""
    wait_s_max: Annotated[float, Meta(ge=1, le=86400)] = 60.0
    """A due merge starts at the latest this long after the first member was ready."""
    period_s: Annotated[float, Meta(ge=1, le=604_800)] = 300.0
    """Members unheard for three of these stop counting in the quorum."""


class PlainOuterSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """A merge is the exact average of weights, which travel as they are."""


class NesterovSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="nesterov"):
    """DiLoCo: a merge moves the anchor, first of all the weights that all begin with, by how far members have come from
    it on average, with momentum (``training.outer_steps``). Only these differences travel. Where all begin differently
    the first merge averages weights."""

    rate: Annotated[float, Meta(gt=0, le=2)] = 0.7
    """eta, of the outer step."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    """mu."""
    warmup: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """The share of the merge points over which steps grow evenly from the plain average (eta 1, mu 0) to these two:
    young models turn too often for momentum."""
    wire: UpdateWire = "e3m0"
    """What differences travel in. What it leaves out is sent with the next ones."""
    streaming: bool = False
    """Whether a merge moves one fragment of ``exchange.fragments``, in turn, but for the first merge and the last:
    as much in all, in smaller portions (Streaming DiLoCo, arXiv 2501.18512)."""

    def __post_init__(self) -> None:
        if self.rate > (most := nesterov_rate_max(self.momentum)):
            raise ValueError(
                f"outer.rate ({self.rate:g}) would drive the anchor away with outer.momentum = {self.momentum:g}: "
                f"set it to {most:.2f} or less"
            )


class PairsSpec(Section, frozen=True, kw_only=True, tag_field="kind", tag="pairs"):
    """NoLoCo: in place of pulls, two members at a time meet half-way, each with a momentum of its own
    (``training.outer_steps.pair_step``). Merges average weights, as without an outer step."""

    rate: Annotated[float, Meta(gt=0, le=2)] = 0.7
    """beta and gamma."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    """alpha."""

    def __post_init__(self) -> None:
        if self.rate > (most := pair_rate_max(self.momentum)):
            raise ValueError(
                f"outer.rate ({self.rate:g}) would drive members apart with outer.momentum = {self.momentum:g}: "
                f"set it to {most:.2f} or less"
            )


OuterSpec: TypeAlias = PlainOuterSpec | NesterovSpec | PairsSpec


class OneByteSpec(Section, frozen=True):
    """One-byte mode: what is learned travels as one byte for each pair of forward passes (``training.one_byte``)."""

    base: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Root of the shard of the base weights (``training.base_weights``), hex; empty: initial weights, drawn alike.
    ``--base`` fills it in."""
    trained: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=64)
    ] = ("*",)
    """Patterns of the names of what is trained, such as ``*.bias``; the rest stays as it is in the base."""
    step_size: LearningRate = 1e-4
    """By which a projected gradient is multiplied when a record is applied."""
    halvings: Annotated[tuple[Annotated[int, Meta(ge=1, le=2**53)], ...], Meta(max_length=32)] = ()
    """Clocks, in records, at which the step size halves; ascending."""
    clip: Annotated[float, Meta(ge=1e-6, le=1e6)] = 10.0
    """The largest projected gradient that a byte can tell, in nats per unit of length along a direction."""
    epsilon: Annotated[float, Meta(ge=1e-6, le=1.0)] = 1e-3
    """How far a probe goes along a direction, to both sides."""
    probes: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Directions probed on each minibatch: a step makes that many records."""
    table: Literal["log", "sign"] = "log"
    """What a byte stands for; ``sign``: only whether the loss rose or fell."""
    pool: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    """Directions that all records share, so that applying any number of records costs as much as applying these;
    0: each record has its own."""
    batch_records: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Records that are signed and sent at once."""
    batch_s_max: Annotated[float, Meta(ge=0.1, le=3600)] = 10.0
    """A record is sent at the latest this long after it was made."""
    snapshot_records: Annotated[int, Meta(ge=0, le=1 << 40)] = 65_536
    """Records between snapshots, from which newcomers start and below which no fork reaches; 0: none are made."""
    snapshot_votes: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Members that must have come to the same snapshot before anybody relies on it."""
    log_allowance: Annotated[int, Meta(ge=4096, le=1 << 30)] = 65_536
    """Records that a log may hold whatever its clock says (docs/PROTOCOL.md, "Batches")."""
    log_share_percent: Annotated[int, Meta(ge=1, le=100)] = 100
    """Records beyond these, in percent of all that are applied. 100 bounds nobody; a few times a fair share keeps a
    flood out."""
    log_reach: Annotated[int, Meta(ge=4096, le=1 << 30)] = 65_536
    """How many records a clock may be ahead of what is applied before its batch has to wait."""
    log_opening_cost: Annotated[int, Meta(ge=0, le=1 << 30)] = 16_384
    """Records of the swarm, beyond the reach, for each time that an author starts over with a new log."""

    def __post_init__(self) -> None:
        if list(self.halvings) != sorted(set(self.halvings)):
            raise ValueError("one_byte.halvings must ascend, each named once")
