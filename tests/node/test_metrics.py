"""The metrics page: what Prometheus reads is what ``gossamer status`` shows, under conventional names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from node.metrics import LAG_PROBE_S, PAGE_S_MAX, MetricsPage
from node.status import MEMBER_STATES, PHASES, NodeStatus
from tests.cli.fake_node import MERGE, PEERS, RECORDS, status_of

METRIC = re.compile(r"\b(?:gossamer|process)_\w+")
README = Path(__file__).parents[2] / "examples" / "grafana" / "README.md"
DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "gossamer.json"

GOSSIP = status_of(
    0, last_merge=MERGE, last_merge_s_ago=12.5, merges=4, refusals={"hash": 2, "stall": 7}, problem="wait"
)
UNSEEN = {
    "gossamer_uptime_seconds",
    "gossamer_tokens",
    "gossamer_sent_today_bytes",
    "gossamer_received_today_bytes",
    "gossamer_merge_contributed",
    "gossamer_mixes_one_sided_total",
    "gossamer_duplicate_batches_total",
    "gossamer_peers_ceiling",
    "gossamer_event_loop_lag_seconds_count",
    "gossamer_event_loop_lag_seconds_sum",
    "gossamer_event_loop_lag_seconds_created",
}
"""Served, and in no panel."""
ONE_BYTE = status_of(0, records=RECORDS, unit="token", phase="joining")


@pytest.fixture(name="clock", autouse=True)
def stopped_clock(mock_clock: MockClock) -> MockClock:
    """Time stands still, so that no page gets too old by itself."""
    return mock_clock


async def page_of(status: NodeStatus) -> dict[str, Metric]:
    """The page's metrics by name, as Prometheus' own parser reads them."""
    text = (await MetricsPage(lambda: status).text()).decode()
    return {metric.name: metric for metric in text_string_to_metric_families(text)}


def values(metric: Metric) -> dict[str, float]:
    """The samples of ``metric`` by the value of their only label, or of none."""
    return {"".join(sample.labels.values()): sample.value for sample in metric.samples}


async def test_the_page_says_what_status_says() -> None:
    page = await page_of(GOSSIP)
    told = {name: values(metric).get("") for name, metric in page.items()}
    # A counter's family goes by its name without _total.
    expected = {
        "gossamer_step": 50,
        "gossamer_steps_planned": 100,
        "gossamer_tokens": 51_200,
        "gossamer_tokens_per_second": 12_345,
        "gossamer_loss": 2.75,
        "gossamer_problem": 1,
        "gossamer_uptime_seconds": 75,
        "gossamer_connections": 1,
        "gossamer_relayed_connections": 0,
        "gossamer_sent_bytes": 3 << 20,
        "gossamer_received_bytes": 2 << 20,
        "gossamer_merge_height": 1,
        "gossamer_merge_age_seconds": 12.5,
        "gossamer_merge_duration_seconds": 0.5,
        "gossamer_merge_contributors": 3,
        "gossamer_merge_contributed": 1,
        "gossamer_merges": 4,
        "gossamer_mixes": 9,
        "gossamer_mixes_failed": 1,
        "gossamer_mixes_one_sided": 0,
        "gossamer_disk_bytes": 5 << 20,
        "gossamer_checkpoint_step": 40,
    }
    assert {name: told[name] for name in expected} == expected
    assert values(page["gossamer_refusals"]) == {"hash": 2, "stall": 7}
    assert values(page["gossamer_members"]) == {**dict.fromkeys(MEMBER_STATES, 0), "alive": 2}
    assert {phase for phase, on in values(page["gossamer_phase"]).items() if on} == {"training"}
    (node,) = page["gossamer_node_info"].samples
    assert (node.labels["peer"], node.labels["run"], node.labels["unit"]) == (PEERS[0], "demo", "byte")


async def test_one_byte_mode_has_records_instead_of_merges() -> None:
    page = await page_of(ONE_BYTE)
    expected = {
        "gossamer_records_applied": 700,
        "gossamer_records_waiting": 3,
        "gossamer_records_unsent": 2,
        "gossamer_duplicate_batches": 5,
        "gossamer_logs": 3,
        "gossamer_logs_forked": 1,
        "gossamer_members_agreeing": 2,
        "gossamer_peers_ceiling": 21.5,
    }
    assert {name: values(page[name])[""] for name in expected} == expected
    assert {phase for phase, on in values(page["gossamer_phase"]).items() if on} == {"joining"}
    assert not any(name.startswith(("gossamer_merge", "gossamer_mix")) for name in page)


async def test_what_is_not_known_yet_is_absent_and_not_zero() -> None:
    young = status_of(0, loss=None, last_merge=None)
    page = await page_of(young)
    for name in ("gossamer_loss", "gossamer_merge_height", "gossamer_merge_age_seconds"):
        assert name not in page


async def test_the_process_is_measured_too() -> None:
    page = await page_of(GOSSIP)
    assert values(page["gossamer_trio_tasks"])[""] >= 1
    assert values(page["process_open_fds"])[""] > 3
    assert values(page["process_resident_memory_bytes"])[""] > 1 << 20


async def test_names_and_kinds_keep_to_the_conventions() -> None:
    for status in (GOSSIP, ONE_BYTE):
        for name, metric in (await page_of(status)).items():
            assert re.fullmatch(r"(gossamer|process)_[a-z_]+[a-z]", name)
            assert metric.documentation, name
            for sample in metric.samples:
                assert sample.name.endswith("_total") == (metric.type == "counter"), name


async def test_a_larger_swarm_has_no_more_series() -> None:
    def swarm(size: int) -> NodeStatus:
        like = GOSSIP.peers[0]
        peers = [msgspec.structs.replace(like, peer=f"12D3KooW{number:044}") for number in range(size)]
        return msgspec.structs.replace(GOSSIP, peers=peers)

    few, many = [
        sum(len(metric.samples) for metric in (await page_of(swarm(size))).values()) for size in (1, 1000)
    ]
    assert few == many


async def test_a_name_that_means_something_in_the_format_breaks_no_line() -> None:
    name = 'a"b\\c\nd{e}'
    page = await page_of(msgspec.structs.replace(GOSSIP, name=name))
    assert page["gossamer_node_info"].samples[0].labels["name"] == name


async def test_asking_often_makes_few_pages(clock: MockClock) -> None:
    looks = 0

    def look() -> NodeStatus:
        nonlocal looks
        looks += 1
        return GOSSIP

    page = MetricsPage(look)
    for _ in range(5):
        await page.text()
    assert looks == 1
    clock.jump(PAGE_S_MAX)
    await page.text()
    assert looks == 2


async def test_a_busy_event_loop_shows(clock: MockClock) -> None:
    page = MetricsPage(lambda: GOSSIP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page.watch_lag)
        await trio.testing.wait_all_tasks_blocked()
        clock.jump(LAG_PROBE_S + 0.5)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    text = (await page.text()).decode()
    (lag,) = [m for m in text_string_to_metric_families(text) if m.name == "gossamer_event_loop_lag_seconds"]
    found = {
        sample.name.rpartition("_")[2]: sample.value for sample in lag.samples if "le" not in sample.labels
    }
    assert found["count"] == 1
    assert found["sum"] == pytest.approx(0.5)


async def test_every_metric_of_the_dashboard_is_served() -> None:
    served = {
        sample.name
        for status in (GOSSIP, ONE_BYTE)
        for metric in (await page_of(status)).values()
        for sample in metric.samples
    }
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [
        variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable
    ]
    found = {name for query in asked for name in METRIC.findall(query)}
    assert found <= served
    # And nothing is served that nobody is shown, but what only a question of its own would ask for.
    unseen = {name for name in served - found if name.startswith("gossamer_")}
    assert unseen == UNSEEN


def test_a_node_that_is_down_is_told_from_one_in_any_phase() -> None:
    panels = {panel["title"]: panel for panel in json.loads(DASHBOARD.read_text())["panels"]}
    asked = panels["phase"]["targets"][0]["expr"]
    (names,) = panels["phase"]["fieldConfig"]["defaults"]["mappings"]
    numbers = {int(number): name["text"] for number, name in names["options"].items()}
    told = {int(number): phase for phase, number in re.findall(r'phase="(\w+)"} \* (\d)', asked)}
    assert set(told.values()) == set(PHASES)
    assert numbers == {0: "down"} | told
    assert 'up{instance=~"$node"} * 0' in asked
    down = panels["down or with a problem"]["targets"][0]
    assert 'up{instance=~"$node"} == bool 0' in down["expr"]
    assert down["instant"], "now, and not at the last step of a graph"


async def test_every_metric_is_explained() -> None:
    explained = set(re.findall(r"`(gossamer_\w+)`", README.read_text()))
    served = {
        sample_name(metric)
        for status in (GOSSIP, ONE_BYTE)
        for name, metric in (await page_of(status)).items()
        if name.startswith("gossamer_") and not name.endswith("_created")
    }
    assert explained == served


def sample_name(metric: Metric) -> str:
    """What people ask for: a counter's family goes by its name without ``_total``."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name
