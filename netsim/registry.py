"""Scenarios by name: the ones that come with gossamer, files of one's own, and changes to either.

Owns names, reading and writing scenario files, and ``--set``. What a file may say is ``netsim.scenario``'s, whether
what it says is possible ``netsim.feasible``'s to judge; nothing is run here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import tomli_w
from msgspec.structs import replace

from netsim.scenario import Scenario
from p2p.errors import GossamerError
from p2p.schema import explain, nearest, with_default_kinds

SCENARIO_BYTES_MAX = 256 << 10
"""The longest scenario file."""

_BARE_WORD = re.compile(r"[A-Za-z0-9_./ +:-]*")
_PLACE = re.compile(r"\[(\d+)\]")


class ScenarioError(GossamerError):
    """A scenario that cannot be used: the file, the key, what is wrong and what would be right."""


def builtin_names() -> list[str]:
    """The names of the scenarios that come with gossamer, ``paper/...`` last."""
    found = [path.relative_to(_folder()).with_suffix("").as_posix() for path in _folder().rglob("*.toml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def load_scenario(name: str) -> Scenario:
    """The scenario called ``name``, or in the file ``name``. Raises ScenarioError."""
    if name in builtin_names():
        return parse_scenario((_folder() / f"{name}.toml").read_text("utf-8"), origin=name)
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        near = nearest(name, builtin_names())
        raise ScenarioError(
            f"there is no scenario {name}",
            why=f"gossamer comes with {', '.join(builtin_names())}; anything else is the path of a TOML file",
            fix=f"did you mean {near}?" if near else "gossamer sim ls",
        )
    try:
        with path.open("rb") as file:
            toml = file.read(SCENARIO_BYTES_MAX + 1).decode()
    except OSError as error:
        raise ScenarioError(
            f"cannot read the scenario {name}: {error.strerror}",
            why="a scenario is one TOML file, or the name of one that comes with gossamer",
            fix=_did_you_mean(path) or "gossamer sim ls",
        ) from error
    except UnicodeDecodeError as error:
        raise _unusable(name, "it is not UTF-8 text") from error
    return parse_scenario(toml, origin=name)


def parse_scenario(toml: str, *, origin: str = "given as text") -> Scenario:
    """The scenario that ``toml`` describes; ``origin`` names it in errors. Raises ScenarioError."""
    if len(toml.encode()) > SCENARIO_BYTES_MAX:
        raise _unusable(origin, f"it is longer than {SCENARIO_BYTES_MAX:,} bytes")
    try:
        return _converted(tomllib.loads(toml), origin)
    except tomllib.TOMLDecodeError as error:
        raise _unusable(origin, f"it is not TOML: {error}") from error


def scenario_as_toml(scenario: Scenario) -> str:
    """``scenario`` as TOML with every key written out, so that it means the same when defaults have changed."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(scenario)))


def parse_changes(settings: Iterable[str]) -> dict[str, Any]:
    """``a.b.c=value`` each, as for ``--set``: values as TOML has them, bare words as text. Raises ScenarioError."""
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ScenarioError(
                f"cannot use --set {setting}",
                why="a change names a key of the scenario and its value",
                fix="for example --set churn.per_hour=0.8 or --set fault.0.at_s=5",
            )
        changes[key] = _value(text.strip(), setting)
    return changes


def with_changes(scenario: Scenario, changes: Mapping[str, Any]) -> Scenario:
    """``scenario`` with the values of some dotted keys changed. Raises ScenarioError."""
    if not changes:
        return scenario
    data = _written(scenario)
    for key, value in changes.items():
        _put(data, key, value)
    return _converted(data, f"{scenario.name} with {', '.join(changes)} changed")


def variant_of(scenario: Scenario, name: str) -> Scenario:
    """``scenario`` as its experiment's variant ``name`` has it; no name: as it is. Raises ScenarioError."""
    if not name:
        return scenario
    variants = scenario.experiment.variants if scenario.experiment else ()
    for variant in variants:
        if variant.name == name:
            return with_changes(scenario, variant.change)
    names = [variant.name for variant in variants]
    raise ScenarioError(
        f"the scenario {scenario.name} has no variant {name}",
        why=f"its variants are {', '.join(names)}" if names else "it compares no variants",
        fix=f"did you mean {near}?"
        if (near := nearest(name, names))
        else f"gossamer sim run {scenario.name}",
    )


def small_form(scenario: Scenario) -> Scenario:
    """An experiment's small form: its changes made, only the variants that belong to it. Raises ScenarioError."""
    assert scenario.experiment is not None, "only experiments have a small form"
    small = with_changes(scenario, scenario.experiment.small)
    assert small.experiment is not None
    variants = tuple(variant for variant in small.experiment.variants if variant.small)
    if not variants:
        raise ScenarioError(
            f"no variant of {scenario.name} belongs to its small form",
            why="an experiment without variants compares nothing",
            fix="leave small = false out where a variant costs little",
        )
    return replace(small, experiment=replace(small.experiment, variants=variants))


def _folder() -> Path:
    # Installed packages lie in folders: setuptools marks nothing of ours as fit to run from an archive.
    return Path(str(resources.files("netsim"))) / "scenarios"


def _converted(data: dict[str, Any], origin: str) -> Scenario:
    data = with_default_kinds(data, Scenario)
    try:
        return msgspec.convert(data, Scenario)
    except msgspec.ValidationError as error:
        found = explain(error, data, Scenario)
        raise ScenarioError(
            f"cannot use the scenario {origin}: {found.what}", why=found.why, fix=found.fix
        ) from error


def _unusable(origin: str, reason: str) -> ScenarioError:
    return ScenarioError(
        f"cannot use the scenario {origin}: {reason}",
        why="a scenario is one TOML file",
        fix="correct the file, or start from one that comes with gossamer: gossamer sim ls",
    )


def _did_you_mean(path: Path) -> str:
    near = nearest(path.stem, [name.rpartition("/")[2] for name in builtin_names()])
    beside = nearest(path.name, [other.name for other in path.parent.glob("*.toml")])
    found = str(path.parent / beside) if beside else near
    return f"did you mean {found}?" if found else ""


def _value(text: str, setting: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
        if len(document) > 1:
            raise tomllib.TOMLDecodeError("it is more than one value")
    except tomllib.TOMLDecodeError as error:
        if _BARE_WORD.fullmatch(text):
            return text
        raise ScenarioError(
            f"cannot use --set {setting}: {error}",
            why="the value is read as TOML, bare words as text",
            fix="""quote it for the shell as a whole, for example --set 'network.latency_s=[0.01, 0.2]'""",
        ) from error
    return document["value"]


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key`` in ``data``; keys that no scenario has are found when it is converted."""
    at: Any = data
    *sections, last = steps = _PLACE.sub(r".\1", key).split(".")
    for number, step in enumerate(sections):
        missing: list[Any] | dict[str, Any] = [] if steps[number + 1].isdecimal() else {}
        at = at[_place(at, step, key)] if isinstance(at, list) else at.setdefault(step, missing)
        if not isinstance(at, dict | list):
            raise ScenarioError(
                f"cannot set {key}: {'.'.join(sections[: number + 1])} is a value",
                why="only sections and lists have keys within",
                fix=f"set {'.'.join(sections[: number + 1])} as a whole",
            )
    if isinstance(at, list):
        at[_place(at, last, key)] = value
    else:
        at[last] = value


def _place(items: list[Any], step: str, key: str) -> int:
    if step.isdecimal() and int(step) < len(items):
        return int(step)
    raise ScenarioError(
        f"cannot set {key}: there is no {step} in that list",
        why=f"it has the places 0 to {len(items) - 1}" if items else "the scenario says nothing of it",
        fix="name one of its places, or set the list as a whole",
    )


def _written(value: Any) -> Any:
    """``value`` as a file would say it that leaves out every default, so that changing a kind leaves nothing behind."""
    if isinstance(value, tuple | list):
        return [_written(item) for item in value]
    if not isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    config = value.__struct_config__
    written = {config.tag_field: config.tag} if config.tag_field is not None else {}
    for field in msgspec.structs.fields(value):
        if (inner := getattr(value, field.name)) != field.default:
            written[field.encode_name] = _written(inner)
    return written


def _without_none(value: Any) -> Any:
    """TOML has no null; a key that is absent means it."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value
