"""From a live node to its NodeStatus: the one place that gathers what people and programs are shown."""

from __future__ import annotations

import os

import msgspec
import trio

from gossip.members import Member
from node.answers import describe_member
from node.gossip_node import GossipNode
from node.node import Node
from node.one_byte_node import OneByteNode
from node.status import LogStatus, NodeStatus, PeerStatus, RecordStatus
from node.version import VERSION


def describe(node: Node, *, device: str, parameters: int, unit: str, name: str) -> NodeStatus:
    """A snapshot of ``node`` now."""
    traffic = node.runtime.transport.traffic()
    now_s = trio.current_time()
    gossip = node if isinstance(node, GossipNode) else None
    return NodeStatus(
        peer=node.local,
        name=name,
        version=VERSION,
        pid=os.getpid(),
        uptime_s=now_s - node.began_s,
        addresses=[f"{address}/p2p/{node.local}" for address in node.runtime.transport.local.addresses],
        reach=node.reachability.reach,
        relays=[*node.reachability.relays],
        mapped=[*node.reachability.mapped],
        run_id=node.run_id.hex(),
        run_name=node.spec.name,
        private=node.swarm_key is not None,
        phase=node.phase,
        problem=node.current_problem(),
        device=device,
        parameters=parameters,
        step=node.step,
        steps_total=node.spec.train.steps,
        loss=node.loss,
        unit=unit,
        tokens_per_s=node.tokens_per_s if node.phase == "training" else 0.0,
        tokens=node.tokens,
        mixes=gossip.exchanger.mixes if gossip else 0,
        mixes_failed=gossip.exchanger.mixes_failed if gossip else 0,
        mixes_one_sided=gossip.exchanger.one_sided if gossip else 0,
        last_mix=gossip.exchanger.last_mix if gossip else None,
        last_merge=gossip.merges.last if gossip else None,
        last_merge_s_ago=_merged_s_ago(gossip) if gossip else None,
        merges=gossip.merges.count if gossip else 0,
        arrival=gossip.merges.arrival if gossip else None,
        records=_describe_records(node) if isinstance(node, OneByteNode) and node.remembers else None,
        bytes_sent=traffic.bytes_sent,
        bytes_received=traffic.bytes_received,
        bytes_sent_today=node.bytes_sent_today,
        bytes_received_today=node.bytes_received_today,
        peers=[_describe_peer(node, member) for member in node.members.members(now_s)],
        refusals=node.refusals(),
        checkpoint_step=node.checkpoints.step,
        disk_bytes=node.store.statistics().bytes_on_disk,
    )


def _merged_s_ago(node: GossipNode) -> float | None:
    return None if node.merges.last_s is None else trio.current_time() - node.merges.last_s


def _describe_records(node: OneByteNode) -> RecordStatus:
    heads = node.logs.heads()
    state = node.keeper.state_hash
    beats = [beat for _, beat, _ in node.members.words_of_alive(trio.current_time())]
    vector = node.logs.digest()
    return RecordStatus(
        applied=node.applied.records,
        waiting=node.logs.waiting,
        unsent=node.author.open,
        duplicates=node.spread.duplicates,
        logs=len(heads),
        forked=sum(head.forked for head in heads),
        log=node.author.log.hex(),
        vector=vector.hex(),
        state=None if state is None else state.hex(),
        agree=sum(beat.vector == vector and beat.state == state for beat in beats),
        ceiling=node.keeper.ceiling,
    )


def describe_logs(node: OneByteNode) -> list[LogStatus]:
    """Every log that ``node`` holds, the longest first."""
    found = []
    for head in node.logs.heads():
        author, incarnation, records, waiting = node.logs.describe(head.log)
        last = node.logs.last(head.log)
        found.append(
            LogStatus(
                log=head.log.hex(),
                author=author,
                incarnation=incarnation,
                batches=head.number,
                records=records,
                waiting=waiting,
                clock=0 if last is None else last.clock,
                last=head.name.hex(),
                forked=head.forked,
            )
        )
    return sorted(found, key=lambda log: -log.records)


def _describe_peer(node: Node, member: Member) -> PeerStatus:
    beat = member.heartbeat
    described = describe_member(node, member, bytes_pulled=node.fetcher.bytes_pulled[member.peer])
    if not isinstance(node, OneByteNode):
        return described
    same = beat.vector == node.logs.digest() and bool(beat.state) and node.keeper.state_hash is not None
    return msgspec.structs.replace(
        described,
        records=node.applied.records_of(member.peer),
        behind=node.logs.records - beat.records,
        influence=node.applied.influence_of(member.peer),
        agrees=beat.state == node.keeper.state_hash if same else None,
    )
