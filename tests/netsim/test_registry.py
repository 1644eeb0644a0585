"""Scenarios by name and from files, changed key by key, and what people are told when they cannot be used."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netsim.experiments import CRITERIA, Verdict
from netsim.feasible import check_memory, check_scenario, memory_available_bytes, memory_bytes
from netsim.registry import (
    SCENARIO_BYTES_MAX,
    ScenarioError,
    builtin_names,
    load_scenario,
    parse_changes,
    parse_scenario,
    scenario_as_toml,
    variant_of,
    with_changes,
)
from netsim.scenario import (
    NODES_MAX,
    ExpectSpec,
    ExperimentSpec,
    Fault,
    Scenario,
    Variant,
)
from training.run_spec import RunSpec

SCENARIO = Scenario(name="small", run=RunSpec(name="small"))
FAULTS: list[type[Fault]] = list(Fault.__args__)


def told(error: pytest.ExceptionInfo[ScenarioError]) -> str:
    return f"{error.value.what} | {error.value.why} | {error.value.fix}"


def changed(*settings: str, of: Scenario = SCENARIO) -> Scenario:
    return with_changes(of, parse_changes(settings))


# --- files and names ----------------------------------------------------------------------------------------------


def test_the_scenarios_that_come_with_gossamer() -> None:
    names = builtin_names()
    wanted = (
        "ideal wan lossy stragglers flash-crowd churn partition-heal all-but-one everyone-leaves-and-returns"
    )
    wanted += " founder-dies disk-full crash-anywhere swarm-test thousand"
    assert set(wanted.split()) <= set(names)
    assert names == sorted(names, key=lambda name: ("/" in name, name))


@pytest.mark.parametrize("name", builtin_names())
def test_each_of_them_can_be_run_and_says_what_it_is(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert 10 <= len(scenario.about) <= 80
    check_scenario(scenario)
    assert parse_scenario(scenario_as_toml(scenario)) == scenario


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nnodes = 3\n[run]\nname = "mine"\n[run.model]\nlayers = 2\n')
    scenario = load_scenario(str(file))
    assert (scenario.nodes, scenario.run.model.layers) == (3, 2)


def test_a_name_that_is_nearly_right(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        load_scenario("churm")
    assert "there is no scenario churm" in told(caught)
    assert "did you mean churn?" in told(caught)
    (tmp_path / "mine.toml").touch()
    with pytest.raises(ScenarioError) as caught:
        load_scenario(str(tmp_path / "mime.toml"))
    assert f"did you mean {tmp_path / 'mine.toml'}?" in told(caught)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name = ", "it is not TOML"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"#" * (SCENARIO_BYTES_MAX + 1), "it is longer than"),
        (b'name = "a"\n[run]\nname = "a"\n[netwrk]\n', "there is no key netwrk"),
        (b'name = "a"\n[run]\nname = "a"\n[network]\nlatency = 1\n', "did you mean latency_s?"),
        (b'name = "a"\nnodes = 5000\n[run]\nname = "a"\n', f"a whole number from 1 to {NODES_MAX:,}"),
        (b'name = "a"\n[run]\nname = "a"\n[[fault]]\nkind = "kil"\n', "did you mean kill?"),
        (b'name = "a"\n[run]\nname = "a"\n[run.exchange]\nrule = "meen"\n', "did you mean mean?"),
        (b'name = "a"\nduration_s = nan\n[run]\nname = "a"\n', "duration_s must be a number above 0"),
        (b'name = "a"\n', "run is missing"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(str(file))
    assert expected in told(caught)
    assert str(file) in caught.value.what


# --- back to TOML -------------------------------------------------------------------------------------------------

numbers = st.floats(0, 1e6, allow_nan=False) | st.integers(0, 100).map(float)
ranges = numbers | st.tuples(numbers, numbers)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
values = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | texts
machines = st.lists(st.integers(0, 9) | st.sampled_from(["all", "founder"]), max_size=3).map(tuple)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(FAULTS))
    more: dict[str, Any] = {}
    if "attacker" in kind.__struct_fields__:
        more["attacker"] = draw(texts)
    if "times" in kind.__struct_fields__:
        more["times"] = draw(ranges)
    if "one_way" in kind.__struct_fields__:
        more |= {"one_way": draw(st.booleans()), "parts": draw(st.integers(2, 4))}
    return kind(at_s=draw(ranges), for_s=draw(ranges), machines=draw(machines), **more)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    setting = st.dictionaries(keys, values | st.lists(values, max_size=3), max_size=3)
    experiment = None
    if draw(st.booleans()):
        names = draw(
            st.lists(st.from_regex(r"[a-z0-9][a-z0-9._ =,-]{0,9}", fullmatch=True), min_size=1, max_size=3)
        )
        variants = tuple(Variant(name=name, change=draw(setting)) for name in names)
        experiment = ExperimentSpec(criterion=draw(texts), variants=variants, small=draw(setting))
    expect = st.builds(ExpectSpec, metric=texts, at_least=st.none() | numbers, at_most=st.none() | numbers)
    base = Scenario(
        name="varied",
        about=draw(texts),
        topology=draw(texts),
        run=RunSpec(name="varied", seed=draw(st.integers(0, 2**53))),
        fault=tuple(draw(st.lists(faults(), max_size=4))),
        expect=tuple(draw(st.lists(expect, max_size=3))),
        experiment=experiment,
    )
    network = msgspec.structs.replace(
        base.network,
        latency_s=draw(ranges),
        latency_matrix_s=tuple(draw(st.lists(st.tuples(numbers, numbers), max_size=2))),
    )
    return msgspec.structs.replace(base, network=network)


@settings(max_examples=60, deadline=None)
@given(scenarios())
def test_toml_of_any_scenario_is_that_scenario(scenario: Scenario) -> None:
    assert parse_scenario(scenario_as_toml(scenario)) == scenario


def test_toml_names_every_key_so_that_defaults_may_change() -> None:
    toml = scenario_as_toml(SCENARIO)
    for key in ("latency_s = 0.02", "step_s = 0.1", "every_steps = 5", 'kind = "quadratic"'):
        assert key in toml


# --- --set --------------------------------------------------------------------------------------------------------


def test_keys_are_set_with_values_as_toml_has_them() -> None:
    scenario = changed(
        "nodes=12",
        "topology = ring",
        'about="a = b"',
        "network.latency_s=[0.1, 0.2]",
        "run.exchange.rule=mean",
        "learner.resampled=true",
        'fault=[{kind="kill", at_s=3, machines=["founder"]}]',
    )
    assert scenario.nodes == 12
    assert scenario.topology == "ring"
    assert scenario.about == "a = b"
    assert scenario.network.latency_s == (0.1, 0.2)
    assert scenario.run.exchange.rule == "mean"
    assert scenario.learner.resampled is True
    assert scenario.fault[0].machines == ("founder",)
    assert SCENARIO.nodes == 8


def test_places_in_lists_are_named_by_their_number() -> None:
    heal = load_scenario("partition-heal")
    scenario = changed("fault.1.at_s=5", "fault[2].parts=4", of=heal)
    assert scenario.fault[1].at_s == 5.0
    assert scenario.fault[0] == heal.fault[0]
    assert "parts=4" in repr(scenario.fault[2])


def test_a_section_may_become_one_of_another_kind() -> None:
    plain = changed('run.model={kind="mlp", inputs=64, classes=10}', 'run.data={source="npz"}')
    assert plain.run.model.layers == 2
    assert changed("run.model.kind=gpt", "run.data.source=stdlib", of=SCENARIO).run == SCENARIO.run


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("nodes", "for example --set churn.per_hour=0.8"),
        ("=3", "a change names a key of the scenario and its value"),
        ("noodes=3", "did you mean nodes?"),
        ("latency_s=3", "did you mean network.latency_s?"),
        ("network.latnecy_s=3", "did you mean latency_s?"),
        ("nodes=many", 'nodes = "many" is not allowed'),
        ("nodes=0", "from 1 to 1,024"),
        ("nodes.more=1", "nodes must be a whole number"),
        ("about.x.y=1", "about = "),
        ("run.name=[", "the value is read as TOML"),
        ("run.seed=1\nnodes=3", "more than one value | the value is read as TOML"),
        ("fault.0.at_s=5", "the scenario says nothing of it"),
        ("churn.per_hour=-1", "churn.per_hour must be a number from 0"),
        ("about=2020-01-01", "about must be text"),
    ],
)
def test_what_cannot_be_set(setting: str, expected: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        changed(setting, of=msgspec.structs.replace(SCENARIO, fault=()))
    assert expected in told(caught)


def test_a_place_that_is_not_there() -> None:
    with pytest.raises(ScenarioError) as caught:
        changed("fault.5.at_s=5", of=load_scenario("partition-heal"))
    assert "it has the places 0 to 4" in told(caught)
    with pytest.raises(ScenarioError) as caught:
        changed("fault.0.at_s.x=5", of=load_scenario("partition-heal"))
    assert "fault.0.at_s is a value" in told(caught)


def test_variants_are_changes_by_name() -> None:
    variants = (Variant(name="ring", change={"topology": "ring"}), Variant(name="many", change={"nodes": 9}))
    scenario = msgspec.structs.replace(SCENARIO, experiment=ExperimentSpec(criterion="c", variants=variants))
    assert variant_of(scenario, "") is scenario
    assert variant_of(scenario, "ring").topology == "ring"
    assert variant_of(scenario, "many").nodes == 9
    with pytest.raises(ScenarioError) as caught:
        variant_of(scenario, "rung")
    assert "did you mean ring?" in told(caught)
    with pytest.raises(ScenarioError) as caught:
        variant_of(SCENARIO, "ring")
    assert "it compares no variants" in told(caught)


# --- what cannot be run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["topology=ringg"], "there is no topology 'ringg'"),
        (["topology=torus", "nodes=7"], "there is no topology 'torus' over 7 members"),
        (["topology=k-regular:9"], "less than the number of members"),
        (["network.latency_s=[0.2, 0.1]"], "write network.latency_s = [0.1, 0.2]"),
        (["network.latency_matrix_s=[[0.1, 0.2]]"], "has 1 rows of 2"),
        (["machines.slowness=[0, 2]"], "machines.slowness may be 0"),
        (["machines.step_s=0"], "machines.step_s may be 0"),
        (['random_faults.kinds=["kill"]', "random_faults.per_hour=0"], "random_faults.per_hour may be 0"),
        (['random_faults.kinds=["kil"]'], "did you mean kill?"),
        (["arrivals.later=8"], "use at most 7"),
        (["arrivals.over_s=700"], "arrivals.over_s comes at 700 s, when all is over since 600 s"),
        (["merge_every_s=700"], "never comes due in 600 s"),
        (["merge_every_s=0.05"], "makes 12000 merges"),
        (["liveness.last_s=600"], "--set liveness.last_s=300"),
        (['fault=[{kind="kill", at_s=600, count=1}]'], "fault[0] (kill) comes at 600 s"),
        (['fault=[{kind="kill", at_s=300, count=1}]', "liveness.last_s=400"], "when all is over since 200 s"),
        (['fault=[{kind="kill", at_s=1, machines=[8]}]'], "names machine 8 of 8"),
        (['fault=[{kind="kill", at_s=1, count=9}]'], "happens to 9 of 8 machines"),
        (['fault=[{kind="join", at_s=1}]'], "brings nobody"),
        (['fault=[{kind="attack", at_s=1, attacker="nobody"}]'], "fault[0].attacker: there is no nobody"),
        (['fault=[{kind="kill", at_s=1, count=1, share=0.5}]'], "more than one of machines, count and share"),
        (['fault=[{kind="slow", at_s=1, count=1, times=0}]'], "fault[0].times may be 0"),
        (['fault=[{kind="join", at_s=1, count=1020}]'], "let at most 1016 join"),
        (['expect=[{metric="comits", at_least=1}]'], "did you mean commits?"),
        (['expect=[{metric="commits"}]'], "give it at_least or at_most"),
        (['expect=[{metric="commits", at_least=nan}]'], "bounds nothing"),
    ],
)
def test_what_is_told_before_anything_runs(settings: list[str], expected: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        check_scenario(changed(*settings))
    assert expected in told(caught)
    assert "cannot run the scenario small" in caught.value.what


def test_what_is_possible_passes() -> None:
    check_scenario(changed("nodes=1"))
    check_scenario(changed('fault=[{kind="partition", at_s=1, for_s=[1, 9]}]', "merge_every_s=10"))
    check_scenario(changed("churn.per_hour=0", "network.latency_s=0"))


def test_more_nodes_than_memory_allows() -> None:
    scenario = changed("nodes=1000")
    enough = int(memory_bytes(scenario) / 0.9) + 1
    check_memory(scenario, processes=1, available_bytes=enough)
    with pytest.raises(ScenarioError) as caught:
        check_memory(scenario, processes=2, available_bytes=enough)
    assert "-j 1" in told(caught)
    with pytest.raises(ScenarioError) as caught:
        check_memory(scenario, processes=1, available_bytes=enough // 2)
    nodes = int(caught.value.fix.removeprefix("--nodes ").partition(",")[0])
    assert 100 < nodes < 1000
    check_memory(changed(f"nodes={nodes}"), processes=1, available_bytes=enough // 2)
    assert memory_available_bytes() > 1 << 28


def test_a_criterion_that_is_not_there() -> None:
    spec = ExperimentSpec(criterion="none-such", variants=(Variant(name="a", change={}),))
    with pytest.raises(ScenarioError) as caught:
        check_scenario(msgspec.structs.replace(SCENARIO, experiment=spec))
    assert "experiment.criterion: there is no none-such" in told(caught)


def test_variants_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "any", lambda results: Verdict(passed=True, table=(), sentence=""))
    variants = (Variant(name="good", change={}), Variant(name="bad", change={"topology": "torus"}))
    spec = ExperimentSpec(criterion="any", variants=variants, small={"nodes": 7})
    with pytest.raises(ScenarioError) as caught:
        check_scenario(changed("nodes=9", of=msgspec.structs.replace(SCENARIO, experiment=spec)))
    assert "small --small, variant bad" in told(caught)


def test_large_models_count_and_so_do_machines_that_join() -> None:
    small = memory_bytes(SCENARIO)
    assert memory_bytes(changed("learner.dimension=1048576")) - small > 8 * 4 * (1 << 20)
    assert memory_bytes(changed("learner.kind=torch")) > small
    assert memory_bytes(changed('fault=[{kind="join", at_s=1, count=8}]')) > small
