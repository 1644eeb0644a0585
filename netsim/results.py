"""Results of simulations as JSON lines: what is written, and read again to be replayed or drawn.

Owns the form of a results file: one ``Header``, then for each seed its ``Sample`` and ``Event`` lines as they came and
one ``SeedResult``. Figures are in seconds of virtual time and bytes unless their name says otherwise. Files may be far
larger than memory, so they are read line by line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from p2p.errors import GossamerError

FORMAT = 1
"""Version of the file's form; a reader refuses another one."""

METRICS = {
    "final_loss": "loss at the end, mean of the nodes that are up",
    "loss_spread": "highest loss at the end, less the lowest",
    "merged_minus_local": "loss of the average of their weights, less their mean loss, before the last merge",
    "dispersion": "distance of the nodes' weights from their mean, relative, at the end",
    "local_accuracy": "accuracy of the nodes, mean, before the last merge or at the end",
    "merged_accuracy": "accuracy of the plain average of their weights at that moment",
    "final_accuracy": "accuracy of the nodes at the end, mean",
    "steps_to_80": "steps until the nodes' mean accuracy was 80 %",
    "variance_ratio_min": "variance of a layer's weights over that at first, the smallest of all layers",
    "contraction": "factor per mix by which the nodes' distance from their mean shrinks",
    "mean_drift": "how far mixing moved their mean, in standard deviations of a mean of so many",
    "commits": "merges committed",
    "merges_due": "merges that came due",
    "commit_share": "due merges committed with 90 % of the members that lived through them",
    "commit_s": "seconds until a due merge is committed, median",
    "join_rounds_max": "merges until a newcomer contributed, the slowest",
    "up_share": "machines up, mean over time",
    "mixes_per_node": "mixes per node",
    "mix_failure_share": "mixes that failed",
    "bytes_per_node": "bytes sent per node",
    "bytes_per_s_peak": "bytes sent per node and second, peak",
    "messages": "frames delivered that carry bytes of messages",
    "deliveries_per_node_s": "deliveries per node and second",
    "deliveries_per_node_round": "deliveries per node and round",
    "deliveries_per_s": "deliveries per second of real time",
    "speedup": "virtual seconds per second of real time",
}
"""The figures of a summary, in the order in which they are shown: what each is, in words."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="line"):
    """Base of all lines."""


class Header(_Line, frozen=True, kw_only=True, tag="header"):
    """The first line."""

    format: int
    version: str
    """Of gossamer."""
    scenario: str
    """The whole scenario as TOML, every change applied."""


class Sample(_Line, frozen=True, kw_only=True, tag="sample"):
    """The swarm at one moment. Lists are by machine, in order; None where a machine is off."""

    seed: int
    variant: str = ""
    at_s: float
    up: int
    """Machines whose process runs."""
    seen: list[int | None]
    """Members each node believes alive, itself included."""
    step: list[int | None]
    loss: list[float | None]
    """Evaluated loss, where the learner can say it cheaply (excess over the optimum for a quadratic)."""
    merged_loss: float | None = None
    """Of the plain average of all live weights, which nobody need hold; where the learner can say it cheaply."""
    dispersion: float | None
    """Root mean square distance of the nodes' weights from their mean, over the norm of it; None if not finite."""
    height: list[int | None]
    """Committed merges each node knows of."""
    bytes_sent: list[int]
    """Payload bytes of each machine since the beginning, over all its lives."""
    accuracy: list[float | None] = []
    """On the examples that all hold out; empty where there are no labelled examples."""
    merged_accuracy: float | None = None
    """Of the plain average of all live weights."""
    variance_ratio: float | None = None
    """Variance of a layer's weights over that at the beginning: the smallest of all layers, mean over the nodes."""


class Event(_Line, frozen=True, kw_only=True, tag="event"):
    """Something that happened: a fault, its end, a start, a stop, a commit."""

    seed: int
    variant: str = ""
    at_s: float
    what: str
    """A fault's kind, ``heal``, ``start``, ``stop``, ``commit`` or ``phase``."""
    machines: list[int]
    detail: str = ""
    until_s: float | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checker found."""

    checker: str
    what: str
    at_s: float
    machine: int | None


class SeedResult(_Line, frozen=True, kw_only=True, tag="seed"):
    """How a seed ended."""

    seed: int
    variant: str = ""
    verdict: Literal["passed", "failed"]
    failures: list[Failure]
    drawn: dict[str, Any]
    """What the seed decided about the scenario: kinds of faults and how often, rates, who is in the core."""
    trace: str
    """Hash over everything that was delivered and everything that happened, hex; equal for equal runs."""
    virtual_s: float
    wall_s: float
    deliveries: int
    """Frames delivered."""
    summary: dict[str, float]
    """Figures by name: what ``[[expect]]`` bounds and what the final table shows."""


Line: TypeAlias = Header | Sample | Event | SeedResult


class ResultsError(GossamerError):
    """A results file that cannot be read: which line, and what is wrong with it."""


def header_for(scenario_toml: str) -> Header:
    """The first line of a results file that is written now."""
    return Header(format=FORMAT, version=version("gossamer"), scenario=scenario_toml)


def encode_line(line: Line) -> bytes:
    """``line`` as one line of JSON, its end included. JSON knows finite numbers only: other figures are left out."""
    if isinstance(line, SeedResult):
        finite = {name: value for name, value in line.summary.items() if math.isfinite(value)}
        line = msgspec.structs.replace(line, summary=finite)
    return msgspec.json.encode(line) + b"\n"


def read_header(path: Path) -> Header:
    """The header of a results file. Raises ResultsError."""
    return next(_lines(path))  # type: ignore[return-value]


def read_lines(path: Path) -> Iterator[Sample | Event | SeedResult]:
    """All lines of a results file after its header, in order. Raises ResultsError."""
    lines = _lines(path)
    next(lines)
    yield from lines  # type: ignore[misc]


_DECODER = msgspec.json.Decoder(Line)


class _Form(msgspec.Struct):
    """As much of a first line as every version of this file has."""

    line: str
    format: int
    version: str = "unknown"


def _lines(path: Path) -> Iterator[Line]:
    try:
        with path.open("rb") as file:
            yield _header(path, file.readline())
            for number, data in enumerate(file, start=2):
                try:
                    if not data.endswith(b"\n"):
                        raise ResultsError(
                            f"line {number} of {path} ends in the middle",
                            why="what wrote it was stopped, so the seed it belongs to is not whole",
                            fix=f"drop that line and read the rest: sed -i '$d' {path}",
                        )
                    line = _DECODER.decode(data)
                    if isinstance(line, Header):
                        raise msgspec.ValidationError("a second header")
                except msgspec.MsgspecError as error:
                    raise ResultsError(
                        f"line {number} of {path} is no line of results: {error}",
                        why="a results file with a wrong line cannot be trusted in the others",
                        fix="make it anew: gossamer sim run",
                    ) from error
                yield line
    except OSError as error:
        raise ResultsError(
            f"cannot read the results {path}: {error.strerror}",
            why="results are written by gossamer sim run",
            fix="name a file that it wrote, for example --out FILE.jsonl",
        ) from error


def _header(path: Path, data: bytes) -> Header:
    try:
        form = msgspec.json.decode(data, type=_Form)
        if form.line != "header":
            raise msgspec.ValidationError(f"it begins with a {form.line}")
        if form.format != FORMAT:
            raise ResultsError(
                f"{path} has format {form.format}, this program reads format {FORMAT}",
                why=f"it was written by gossamer {form.version}, whose lines mean something else",
                fix="read it with that version, or make it anew: gossamer sim run",
            )
        return msgspec.json.decode(data, type=Header)
    except msgspec.MsgspecError as error:
        raise ResultsError(
            f"{path} is not a results file: {error}",
            why="a results file begins with a header that says what was simulated",
            fix="name a file that gossamer sim run wrote",
        ) from error
