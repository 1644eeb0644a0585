"""Hosts in several subnets, two of them behind NAT: the swarm forms, merges, outlives its bootstrap and grows."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from node.status import NodeStatus
from tests.process.internet import Place, internet
from tests.process.single_node import SingleNode
from tests.process.swarm import SPEC, gossamer, merged_alike, until

PLACES = (
    Place(1, 100),
    Place(1, 50),
    Place(2, 100),
    Place(2, 20),
    Place(3, 50, hidden=True),
    Place(3, 20, hidden=True),
    Place(2, 50),
)
HIDDEN = (4, 5)
LATE = 6


def knows_its_place(statuses: list[NodeStatus]) -> bool:
    """Whether all know if they can be dialled, and the hidden ones have relays."""
    return all(
        status.reach == ("private" if number in HIDDEN else "public")
        and bool(status.relays) == (number in HIDDEN)
        for number, status in enumerate(statuses)
    )


@pytest.mark.process
@pytest.mark.timeout(420)
async def test_a_swarm_with_members_behind_nat_merges_and_outlives_its_bootstrap(tmp_path: Path) -> None:
    spec_file = tmp_path / "run.toml"
    spec_file.write_text(SPEC.format(steps=40_000, merges=400))
    with internet(PLACES) as spaces, contextlib.ExitStack() as running:
        nodes = [SingleNode(tmp_path, f"h{number}", namespace=space) for number, space in enumerate(spaces)]
        *first, late = nodes
        bootstrap = f"/ip4/45.10.0.11/tcp/4100/p2p/{nodes[0].peer}"
        running.enter_context(nodes[0].running("--run", str(spec_file), "--threads", "1"))
        for node in first[1:]:
            joins = ("--run", str(spec_file), "--bootstrap", bootstrap, "--threads", "1")
            running.enter_context(node.running(*joins))
        known = await until(first, knows_its_place, seconds=180)
        assert all("/p2p-circuit/p2p/" in known[number].addresses[-1] for number in HIDDEN)
        merged = await until(
            first,
            lambda statuses: merged_alike(statuses, 1) and len(statuses[0].last_merge.contributors) == 6,
            seconds=120,
        )
        # The two that nobody can dial have met all the same, through somebody else.
        (of_each_other,) = [peer for peer in merged[4].peers if peer.peer == nodes[5].peer]
        assert of_each_other.connected
        assert of_each_other.relay in {node.peer for node in first if node not in (nodes[4], nodes[5])}
        # And with those that can be dialled they speak directly.
        assert all(
            peer.relay is None for peer in merged[4].peers if peer.peer != nodes[5].peer and peer.connected
        )

        assert nodes[0].process is not None
        nodes[0].process.kill()
        await until(
            [nodes[4]],
            lambda statuses: bool(statuses[0].relays) and nodes[0].peer not in statuses[0].relays,
            seconds=60,
        )
        # One address, of a peer that nobody can dial.
        invited = gossamer("invite", "--home", nodes[4].home.data_folder, "--peers", "1")
        assert invited.returncode == 0, invited.stderr
        line = invited.stdout.strip()
        assert "p2p-circuit" in line
        running.enter_context(late.running(line, "--threads", "1", verb="join"))
        rest = [*first[1:], late]
        height = max(status.last_merge.height for status in merged)
        grown = await until(
            rest,
            lambda statuses: (
                merged_alike(statuses, 1)
                and statuses[0].last_merge.height > height
                and {late.peer, nodes[4].peer, nodes[5].peer} <= set(statuses[0].last_merge.contributors)
                and nodes[0].peer not in statuses[0].last_merge.contributors
            ),
            seconds=180,
        )
    assert len(grown[0].last_merge.contributors) == 6
