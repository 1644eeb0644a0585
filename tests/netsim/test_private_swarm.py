"""Private swarms and allow-lists in virtual time: who is in merges, who is not, and what is said of it."""

from __future__ import annotations

import random

import pytest
import trio

from gossip.ledger import NOT_ALLOWED
from netsim.world import World
from node.answers import make_advert, make_invite
from node.control import MakeAdvert, MakeInvite
from node.describe import describe
from node.node import Node
from node.rendezvous import Rendezvous
from node.runtime import ContactOptions
from node.status import NodeStatus
from p2p.errors import GossamerError
from p2p.invite import Invite
from p2p.swarm_key import SwarmKey
from tests.gossip.world import MemoryDisk
from tests.netsim.test_attackers import besieged_world, simulated
from tests.netsim.test_world import SPEC, anchors, until

KEY = SwarmKey(b"k" * 32)


def status_of(node: Node) -> NodeStatus:
    return describe(node, device="cpu", parameters=1, unit="byte", name="node")


def lock(world: World, *numbers: int) -> None:
    for number in numbers:
        world.network.swarm_keys[world.machines[number].peer] = KEY


def test_members_of_a_private_swarm_merge_and_a_stranger_gets_nothing() -> None:
    async def main(seed: int) -> None:
        async with besieged_world(seed) as world:
            lock(world, 0, 1)
            members = [await world.start(0), await world.start(1, bootstrap=0)]
            stranger = await world.start(2, bootstrap=0)
            await until(lambda: all(node.merges.count == 1 for node in members), seconds=90)
            assert len(anchors(members)) == 1
            assert [node.members.peers() for node in members] == [[members[1].local], [members[0].local]]
            for node in members:
                assert status_of(node).private
                assert all(len(node.merges.last.contributors) == 2 for node in members)
            assert status_of(members[0]).refusals["swarm-key"] > 0
            outside = status_of(stranger)
            assert (outside.peers, outside.private) == ([], False)
            assert "swarm key" in outside.problem
            # Nobody is told of a swarm that is closed to them.
            with pytest.raises(GossamerError, match="this swarm is private"):
                make_advert(members[0], MakeAdvert(expires_s=60), lambda: 1_000_000)
            options = ContactOptions(
                agent="test/1", limits=members[0].limits, swarm_key=KEY, advertise="for all"
            )
            with pytest.raises(GossamerError, match="this swarm is private"):
                Rendezvous(
                    transport=members[0].transport,
                    disk=MemoryDisk(),
                    signer=members[0].signer,
                    rng=random.Random(1),
                    options=options,
                    spec=SPEC,
                    wall_time_s=trio.current_time,
                )
            # With an invite's key it is one of them.
            answer = make_invite(members[0], MakeInvite(), lambda: 1_000_000)
            assert answer["secret"] is True
            invite = Invite.parse(answer["invite"], now_unix_s=1_000_000)
            assert invite.swarm_key == KEY
            await world.leave(2)
            lock(world, 2)
            joined = await world.start(2, bootstrap=0)
            await until(lambda: len(joined.members.peers()) == 2, seconds=60)
            # Whose key is not the swarm's any more is told so, though nobody gave it an address to begin with.
            await world.leave(1)
            world.network.swarm_keys[world.machines[1].peer] = SwarmKey(b"o" * 32)
            left_behind = await world.start(1)
            await until(lambda: "swarm key" in status_of(left_behind).problem, seconds=30)

    simulated(main, 9)


def test_whom_a_node_does_not_allow_is_shown_as_if_banned() -> None:
    async def main(seed: int) -> None:
        async with besieged_world(seed) as world:
            choosy, friend, other, _ = (machine.peer for machine in world.machines)
            world.network.allowed[choosy] = [friend]
            nodes = [
                await world.start(1),
                await world.start(0, bootstrap=1),
                await world.start(2, bootstrap=1),
            ]
            await until(lambda: len(nodes[1].members.peers()) == 2, seconds=60)
            await trio.sleep(30)
            assert nodes[1].transport.peers() == {friend}
            shown = {peer.peer: peer for peer in status_of(nodes[1]).peers}
            assert (shown[other].state, shown[other].last_problem) == ("banned", NOT_ALLOWED)
            assert shown[friend].state == "alive"
            assert status_of(nodes[1]).refusals["not-allowed"] > 0
            assert nodes[0].transport.peers() == {choosy, other}

    simulated(main, 10)
