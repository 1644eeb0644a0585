"""From a live node to its NodeStatus: the one place that gathers what people and programs are shown."""

from __future__ import annotations

import os

import trio

from gossip.members import Member
from node.gossip_node import GossipNode
from node.status import NodeStatus, PeerStatus

VERSION = "0.1.0"


def describe(node: GossipNode, *, name: str) -> NodeStatus:
    """A snapshot of ``node`` now."""
    traffic = node.runtime.transport.traffic()
    now_s = trio.current_time()
    return NodeStatus(
        peer=node.local,
        name=name,
        version=VERSION,
        pid=os.getpid(),
        uptime_s=now_s - node.began_s,
        addresses=[f"{address}/p2p/{node.local}" for address in node.runtime.transport.local.addresses],
        run_id=node.run_id.hex(),
        run_name=node.spec.name,
        phase=node.phase,
        problem=node.current_problem(),
        device=str(node.trainer.device),
        parameters=node.trainer.layout.total,
        step=node.trainer.step,
        steps_total=node.rounds.steps_total,
        loss=node.loss,
        tokens_per_s=node.tokens_per_s,
        tokens=node.trainer.tokens,
        mixes=node.exchanger.mixes,
        mixes_failed=node.exchanger.mixes_failed,
        last_mix=node.exchanger.last_mix,
        last_merge=node.merges.last,
        merges=node.merges.count,
        bytes_sent=traffic.bytes_sent,
        bytes_received=traffic.bytes_received,
        peers=[_describe_peer(node, member) for member in node.members.members(now_s)],
        refusals=dict(node.ledger.refusals),
        checkpoint_step=node.checkpoints.step,
        disk_bytes=node.store.statistics().bytes_held,
    )


def _describe_peer(node: GossipNode, member: Member) -> PeerStatus:
    beat = member.heartbeat
    return PeerStatus(
        peer=member.peer,
        state="banned" if node.ledger.banned(member.peer) else member.state,
        connected=member.peer in node.runtime.transport.peers(),
        addresses=beat.addresses,
        step=beat.step,
        loss=beat.loss if beat.step else None,
        heard_s_ago=member.unheard_s,
        head_height=beat.head_height,
        standing=node.ledger.standing(member.peer),
        last_problem=node.ledger.last_problem(member.peer),
        bytes_pulled=node.fetcher.bytes_pulled[member.peer],
    )
