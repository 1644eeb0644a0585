"""The local network, between real processes in network namespaces: who finds whom, and what liars come to."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from node.lan import CANDIDATE_PAUSE_S, INTERFACES_LOOK_S
from tests.process.namespaces import ip, local_network
from tests.process.single_node import SingleNode, running
from tests.process.swarm import SPEC, merged_alike, until
from training.run_spec import load_run_spec, run_id

SEARCH_S = 8.0


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_members_on_a_local_network_find_each_other_with_no_address_typed(tmp_path: Path) -> None:
    """One has the spec, one knows the run id alone, and a third, of another run, is left in peace."""
    spec_file, other_file = tmp_path / "run.toml", tmp_path / "other.toml"
    spec_file.write_text(SPEC.format(steps=16_000, merges=64))
    other_file.write_text(SPEC.format(steps=16_001, merges=64))
    run = run_id(load_run_spec(spec_file)).hex()
    with local_network(2) as (left, right):
        first = SingleNode(tmp_path, "first", namespace=left)
        second = SingleNode(tmp_path, "second", namespace=right)
        stranger = SingleNode(tmp_path, "stranger", namespace=right)
        lan, elsewhere = ("--lan", "--threads", "1"), ("--listen", "/ip4/0.0.0.0/tcp/4101")
        with (
            stranger.running("--run", str(other_file), *lan, *elsewhere),
            first.running("--run", str(spec_file), *lan),
            second.running("--run", run, *lan),
        ):
            await until([stranger], lambda statuses: True, seconds=90)
            merged = await until(
                [first, second],
                lambda statuses: merged_alike(statuses, 1) and len(statuses[0].last_merge.contributors) == 2,
                seconds=120,
            )
            (alone,) = await until([stranger], lambda statuses: True, seconds=10)
    assert merged[1].run_id == run
    assert alone.peers == []
    assert not any(status.refusals.get("wrong-run") for status in (*merged, alone))


@pytest.mark.process
@pytest.mark.slow
def test_a_flood_of_announcements_comes_to_few_candidates_and_none_elsewhere(tmp_path: Path) -> None:
    """300 lies, half of them about hosts outside of the network: what is left is slow and near."""
    with (
        local_network(2) as (left, right),
        running([str(FLOOD)], tmp_path / "flood.log", namespace=left) as flood,
    ):
        began_s = time.perf_counter()
        with running([str(SEARCH), str(SEARCH_S)], tmp_path / "search.log", namespace=right) as search:
            assert search.wait(60) == 0, (tmp_path / "search.log").read_text()
        took_s = time.perf_counter() - began_s
        assert flood.poll() is None, (tmp_path / "flood.log").read_text()
    records = candidates(tmp_path / "search.log")
    assert 2 <= len(records) <= took_s / CANDIDATE_PAUSE_S + 1
    assert {address for record in records for address in record["addresses"]} == {"/ip4/10.77.0.1/tcp/4100"}


@pytest.mark.process
@pytest.mark.slow
def test_two_on_one_machine_and_one_whose_network_comes_later_find_each_other(tmp_path: Path) -> None:
    """As when a laptop is carried home: at first it has no network, and then there is one."""
    with local_network(2) as (left, right), contextlib.ExitStack() as stack:
        ip("-n", right, "addr", "flush", "dev", "eth0")
        logs = [tmp_path / name for name in ("one.log", "other.log", "late.log")]
        searches = [
            stack.enter_context(
                running([str(SEARCH), str(3 * INTERFACES_LOOK_S)], log_file, namespace=namespace)
            )
            for log_file, namespace in zip(logs, (left, left, right), strict=True)
        ]
        time.sleep(INTERFACES_LOOK_S)
        ip("-n", right, "addr", "add", "10.77.0.2/24", "dev", "eth0")
        assert [search.wait(90) for search in searches] == [0, 0, 0]
    assert "no search of the local network for now" in logs[2].read_text()
    for log_file, others in zip(logs, ([1, 2], [1, 2], [1, 1]), strict=True):
        found = sorted(record["addresses"][0] for record in candidates(log_file))
        assert found == [f"/ip4/10.77.0.{number}/tcp/4100" for number in others]


def candidates(log_file: Path) -> list[dict[str, Any]]:
    """What lan_search.py printed, between the lines of the log."""
    return [json.loads(line) for line in log_file.read_text().splitlines() if line.startswith("{")]


FLOOD = Path(__file__).parent / "lan_flood.py"
SEARCH = Path(__file__).parent / "lan_search.py"
