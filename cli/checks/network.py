"""Checks of how others reach this node and how it reaches them, through the transport that a node uses itself.

Owns the dials, under a key made for the occasion: a second connection under the node's own would take the place of the
first. Nothing is said in the node's name, and whoever is dialled is only asked for what any newcomer may ask.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import trio

from cli.checks.finding import Finding, Subject, failure
from p2p.errors import GossamerError, IdentityError, NotAllowed, PeerUnreachable, PortInUse, SwarmKeyError
from p2p.limits import DEFAULT_LIMITS
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord, Transport

if TYPE_CHECKING:
    from gossip.messages import Notice

PEERS_DIALLED = 8
NOTICES_ASKED = 64
DIAL_LIMITS = dataclasses.replace(DEFAULT_LIMITS, dial_timeout_s=8.0, call_timeout_s=8.0)
CLOCK_S_OFF = 120.0
"""A node counts its lives from the second of its first start, one more at each; so many starts are put down to that."""

Reach = Literal["here", "private", "shared", "public"]


# --- listening --------------------------------------------------------------------------------------------------------


async def check_port(subject: Subject) -> Sequence[Finding]:
    """Each address to listen on is free, or taken by this home's own node."""
    return [await _check_listening(subject, address) for address in subject.config.listen]


async def _check_listening(subject: Subject, address: str) -> Finding:
    from p2p.identity import Identity
    from p2p.libp2p_transport import open_libp2p

    try:
        async with open_libp2p(Identity.generate(), listen=[address], limits=DIAL_LIMITS):
            return Finding(check="port", level="ok", found=f"{address} is free")
    except PortInUse as error:
        if await _is_our_own(subject, address):
            return Finding(check="port", level="ok", found=f"{address} is this home's own node")
        return failure("port", error)


async def _is_our_own(subject: Subject, address: str) -> bool:
    """Whether who listens there proves this home's key."""
    from p2p.identity import Identity
    from p2p.libp2p_transport import open_libp2p

    try:
        own = Identity.load(subject.home.identity_file).peer
        run = subject.home.remembered_run()
        key = None if run is None else SwarmKey.load(subject.home.swarm_key_file(run))
        async with open_libp2p(
            Identity.generate(), listen=[], limits=DIAL_LIMITS, swarm_key=key
        ) as transport:
            await transport.connect(PeerRecord(own, (_dialled_from_here(address),)))
    except NotAllowed:  # It has proved its key, and does not know ours.
        return True
    except (PeerUnreachable, IdentityError, SwarmKeyError):
        return False
    return True


def _dialled_from_here(address: str) -> str:
    return address.replace("/ip4/0.0.0.0/", "/ip4/127.0.0.1/").replace("/ip6/::/", "/ip6/::1/")


# --- being found ------------------------------------------------------------------------------------------------------


async def check_addresses(subject: Subject) -> Sequence[Finding]:
    """What others are told to dial, and who of them can."""
    addresses = subject.config.announce or await _addresses_of_interfaces(subject.config.listen)
    return [judge_addresses(addresses)]


async def _addresses_of_interfaces(listen: Sequence[str]) -> Sequence[str]:
    """What a node that listens there would tell others; found on other ports, as these may be taken."""
    from p2p.identity import Identity
    from p2p.libp2p_transport import open_libp2p

    found: list[str] = []
    for address in listen:
        host, _, port = address.rpartition("/tcp/")
        async with open_libp2p(Identity.generate(), listen=[f"{host}/tcp/0"]) as transport:
            found += [f"{each.rpartition('/tcp/')[0]}/tcp/{port}" for each in transport.local.addresses]
    return found


def judge_addresses(addresses: Sequence[str]) -> Finding:
    """Who can dial one of ``addresses``."""
    told = ", ".join(addresses) or "none"
    reaches = {_reach_of(address) for address in addresses}
    forward = (
        'forward the port on the router, and set announce = ["/ip4/YOUR.PUBLIC.IP/tcp/PORT"] in config.toml'
    )
    if not reaches & {"private", "shared", "public"}:
        return Finding(
            check="addresses",
            level="warn",
            found=f"only this machine can dial {told}",
            why="no peer on another machine can connect; this node has to dial all of them",
            fix='set listen = ["/ip4/0.0.0.0/tcp/4100"] in config.toml',
        )
    if "public" not in reaches:
        shared = "shared" in reaches
        return Finding(
            check="addresses",
            level="warn",
            found=f"only {'the network of the provider' if shared else 'the local network'} can dial {told}",
            why="enough for machines on one network; peers elsewhere cannot connect, this node has to dial them",
            fix="ask the provider for an address of your own, or let others be dialled"
            if shared
            else forward,
        )
    if all(_family_of(address) == "ip6" for address in addresses if _reach_of(address) == "public"):
        return Finding(
            check="addresses",
            level="warn",
            found=f"from outside only over IPv6: {told}",
            why="peers that have IPv4 alone cannot connect",
            fix=forward,
        )
    return Finding(check="addresses", level="ok", found=f"anybody can be told to dial {told}")


def _family_of(address: str) -> str:
    return address.split("/")[1]


def _reach_of(address: str) -> Reach:
    _, family, host, *_ = address.split("/")
    if family.startswith("dns"):
        return "here" if host == "localhost" else "public"
    ip = ipaddress.ip_address(host)
    if ip.is_loopback or ip.is_link_local:
        return "here"
    if ip.is_private:
        return "private"
    return "public" if ip.is_global else "shared"


# --- finding others, and what time it is there ------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Answers:
    reached: list[PeerId] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    notices: list[Notice] = dataclasses.field(default_factory=list)
    """Of everybody, signatures checked."""


async def check_peers(subject: Subject) -> Sequence[Finding]:
    """Whether those that this node would start from answer, prove their ids and follow the run; and their clocks."""
    from p2p.identity import Identity
    from p2p.libp2p_transport import open_libp2p

    try:
        own: PeerId | None = Identity.load(subject.home.identity_file).peer
    except IdentityError:
        own = None
    records = [record for record in await _known_peers(subject) if record.peer != own]
    answers, of_ours = _Answers(), _Answers()
    async with (
        open_libp2p(
            Identity.generate(), listen=[], limits=DIAL_LIMITS, swarm_key=subject.swarm_key
        ) as transport,
        trio.open_nursery() as nursery,
    ):
        for record in records:
            nursery.start_soon(_ask, transport, record, subject.run, answers)
        if own is not None:
            # A running node of this home has heard of more members than it takes to dial.
            ours = PeerRecord(own, tuple(_dialled_from_here(address) for address in subject.config.listen))
            nursery.start_soon(_ask, transport, ours, subject.run, of_ours)
    notices = {notice.author: notice for notice in (*answers.notices, *of_ours.notices)}
    own_life = notices.pop(own, None) if own is not None else None
    begun = [notice.incarnation for notice in notices.values()]
    return [
        _judge_peers(records, answers),
        judge_clock(subject.now_unix_s, begun, own_life.incarnation if own_life is not None else None),
    ]


async def _known_peers(subject: Subject) -> list[PeerRecord]:
    """Those named on the command line, then those that the home remembers of its run."""
    from gossip.address_book import AddressBook, parse_peer_address
    from node.disk import LocalDisk

    named = [parse_peer_address(text, chars_max=DIAL_LIMITS.address_chars_max) for text in subject.bootstrap]
    records = [PeerRecord(peer, (address,)) for peer, address in named]
    folder = None if subject.run is None else subject.home.run_folder(subject.run)
    if folder is not None and folder.is_dir():
        book = AddressBook(LocalDisk(folder), local=PeerId(""), limits=DIAL_LIMITS, rng=random.Random())
        await book.load()
        chosen = {record.peer for record in records}
        records += book.due(PEERS_DIALLED, exclude=chosen, now_s=trio.current_time())
    return records[:PEERS_DIALLED]


async def _ask(transport: Transport, record: PeerRecord, run: bytes | None, answers: _Answers) -> None:
    """Dial, have the peer prove its id, ask for the run's spec, and for what members say of themselves."""
    from gossip.messages import HELLO_PROTOCOL, Notices, WantPeers
    from gossip.newcomer import fetch_spec
    from p2p.rpc import call

    timeout_s = DIAL_LIMITS.call_timeout_s
    try:
        await transport.connect(record)
        if run is not None:
            await fetch_spec(transport, record.peer, run, timeout_s=timeout_s)
            want = WantPeers(count=NOTICES_ASKED)
            reply = await call(transport, record.peer, HELLO_PROTOCOL, want, Notices, timeout_s=timeout_s)
            answers.notices += _signed(run, reply.notices)
        answers.reached.append(record.peer)
    except NotAllowed:  # It is there, and has proved its id; on its list is the node, not the doctor.
        answers.reached.append(record.peer)
    except GossamerError as error:
        answers.failures.append(f"{record.peer}: {error.what}")


def _signed(run: bytes, packed: Sequence[bytes]) -> list[Notice]:
    """Those whose signatures hold."""
    from gossip.messages import Notice
    from gossip.notices import NoticeTable, Verdict
    from p2p.codec import decode
    from p2p.identity import Identity

    table = NoticeTable(signer=Identity.generate(), run=run, incarnation=1, limits=DIAL_LIMITS)
    now_s = trio.current_time()
    return [
        decode(each, Notice, bytes_max=DIAL_LIMITS.notice_bytes_max)
        for each in packed
        if table.offer(each, now_s) is Verdict.ACCEPTED
    ]


def _judge_peers(records: Sequence[PeerRecord], answers: _Answers) -> Finding:
    if not records:
        return Finding(
            check="peers",
            level="skip",
            found="no peer is known to this home that could be dialled",
            why="a node without peers trains alone until one dials it",
            fix="name one: gossamer doctor --bootstrap ADDRESS    or give the invite: gossamer doctor 'INVITE'",
        )
    found = f"{len(answers.reached)} of {len(records)} answered"
    if not answers.reached:
        return Finding(
            check="peers",
            level="fail",
            found="; ".join([found, *answers.failures]),
            why="a node that reaches nobody trains alone",
            fix="is one of them up (gossamer status there), its port open, this machine online? ask for a new invite",
        )
    return Finding(check="peers", level="ok", found="; ".join([found, *answers.failures]))


def judge_clock(now_unix_s: float, begun: Sequence[int], own: int | None) -> Finding:
    """This machine's clock, by the lives that members have ``begun`` and that this node has (``own``).

    A member counts its lives from the second at which it first started, so none can have begun in the future. A clock
    that is ahead cannot be told in this way; one that is behind can.
    """
    why = "invites seem valid for longer than they are, and a node that lost its memory may not be believed"
    fix = "set it by the network: sudo timedatectl set-ntp true"
    if own is not None and own - now_unix_s > CLOCK_S_OFF:
        return Finding(
            check="clock",
            level="fail",
            found=f"{_duration(own - now_unix_s)} behind where it was when this node was started",
            why=why,
            fix=fix,
        )
    ahead = sorted(life - now_unix_s for life in begun if life - now_unix_s > CLOCK_S_OFF)
    if 2 * len(ahead) > len(begun):
        return Finding(
            check="clock",
            level="fail",
            found=f"at least {_duration(statistics.median_low(ahead))} behind {len(ahead)} of {len(begun)} members",
            why=why,
            fix=fix,
        )
    if not begun and own is None:
        return Finding(
            check="clock",
            level="skip",
            found="nobody answered who could tell what time it is there",
            why=why,
        )
    others = f"{len(begun) - len(ahead)} of {len(begun)} members" if begun else "this node's own earlier word"
    return Finding(
        check="clock", level="ok", found=f"not behind {others}; whether it is ahead they cannot tell"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
