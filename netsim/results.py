"""Results of simulations as JSON lines: what is written, and read again to be replayed or drawn.

Owns the form of a results file: one ``Header``, then for each seed its ``Sample`` and ``Event`` lines as they came and
one ``SeedResult``. Values only; figures are in seconds of virtual time and bytes unless their name says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

FORMAT = 1
"""Version of the file's form; a reader refuses another one."""


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
    dispersion: float
    """Root mean square distance of the nodes' weights from their mean, over the norm of the mean."""
    height: list[int | None]
    """Committed merges each node knows of."""
    bytes_sent: list[int]
    """Payload bytes of each machine since the beginning, over all its lives."""


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
