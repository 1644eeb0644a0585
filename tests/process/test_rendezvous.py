"""A rendezvous in a process of its own: it brings trainers together, counts for nothing, and can be spared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest
import trio

from cli.node_process import NodeProcess, free_ports
from node.control import ControlError, MakeAdvert, MakeInvite, MergeNow, ask
from node.status import NodeStatus
from p2p.advert import read_list
from p2p.invite import Invite
from tests.process.single_node import SingleNode
from tests.process.swarm import SPEC, merged_alike, until


def merged(statuses: list[NodeStatus], contributors: int, height: int) -> bool:
    return merged_alike(statuses, height) and len(statuses[0].last_merge.contributors) == contributors


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_trainers_that_know_only_the_rendezvous_merge_and_then_do_without_it(tmp_path: Path) -> None:
    spec_file = tmp_path / "run.toml"
    spec_file.write_text(SPEC.format(steps=16_000, merges=64))
    ports = free_ports(3)
    rendezvous = SingleNode(tmp_path, "rendezvous")
    rendezvous.home.config_file.write_text('advertise = "for everybody"\n')
    place = ["--listen", f"/ip4/127.0.0.1/tcp/{ports[2]}"]
    trainers = [
        NodeProcess(tmp_path, f"n{k}", port=ports[k], part=f"{k + 1}/2", spec_file=spec_file, alone=False)
        for k in range(2)
    ]
    try:
        with rendezvous.running("--bootstrap-only", "--run", str(spec_file), *place):
            (up,) = await until([rendezvous], lambda statuses: True, seconds=60)
            for node in trainers:
                node.start([up.addresses[0]])
            both = await until(trainers, lambda statuses: merged(statuses, 2, 1), seconds=120)
            (seen,) = await until([rendezvous], lambda s: len(s[0].peers) == 2, seconds=20)
            assert seen.phase == "rendezvous"
            assert not any(loaded_torch(pid) for pid in [seen.pid])
            assert all(loaded_torch(status.pid) for status in both)
            # Nobody takes it for a member: it is in no member table, and each merge was the trainers' alone.
            for status in both:
                assert [peer.peer for peer in status.peers] == [s.peer for s in both if s is not status]
                assert status.last_merge.contributors == sorted(s.peer for s in both)

            with pytest.raises(ControlError, match="it holds no model"):
                await ask(rendezvous.home.control_socket, "merge_now", MergeNow())
            line = await ask(rendezvous.home.control_socket, "invite", MakeInvite())
            invite = Invite.parse(line["invite"], now_unix_s=0.0)
            told = await ask(
                rendezvous.home.control_socket, "advert", MakeAdvert(about="a test", expires_s=60)
            )
            (advert,), unusable = read_list(told["advert"].encode(), 0.0, origin="the rendezvous")
            assert (advert.claim.run, advert.peer, unusable) == (seen.run_id, seen.peer, [])
            assert seen.addresses[0] in advert.claim.addresses
            # Somebody who knows one address, and nothing else, sees which swarms there are.
            asked = ["-m", "cli", "swarms", "--json", "--from", seen.addresses[0]]
            shown = await trio.run_process([sys.executable, "-P", *asked], capture_stdout=True)
            own = json.loads(shown.stdout)
            assert (own["peer"], own["claim"]["about"]) == (seen.peer, "for everybody")
            assert invite.run.hex() == seen.run_id
            assert invite.addresses[0] == seen.addresses[0]

        height = both[0].last_merge.height
        after = await until(trainers, lambda statuses: merged(statuses, 2, height + 2), seconds=90)
        assert all(now.step > then.step and not now.refusals for now, then in zip(after, both, strict=True))
    finally:
        for node in trainers:
            node.kill()


def loaded_torch(pid: int) -> bool:
    """Whether the process has torch's libraries mapped."""
    return any("libtorch" in mapped.path for mapped in psutil.Process(pid).memory_maps())
