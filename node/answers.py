"""What every daemon answers over its control socket, a member or a rendezvous: members, invites, adverts, the spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gossip.members import Member
from node.contact import Contact
from node.control import MakeAdvert, MakeInvite
from node.status import PeerStatus
from p2p.invite import Invite
from training.run_spec import canonical_bytes, spec_as_toml


def describe_member(contact: Contact, member: Member, *, bytes_pulled: int = 0) -> PeerStatus:
    """One member as ``contact`` sees it; ``bytes_pulled``: of shards that it served."""
    beat = member.heartbeat
    return PeerStatus(
        peer=member.peer,
        state="banned" if contact.ledger.banned(member.peer) else member.state,
        connected=member.peer in contact.transport.peers(),
        relay=contact.transport.relay_of(member.peer),
        addresses=beat.addresses,
        step=beat.step,
        loss=beat.loss if beat.step else None,
        heard_s_ago=member.unheard_s,
        head_height=beat.head_height,
        standing=contact.ledger.standing(member.peer),
        last_problem=contact.ledger.last_problem(member.peer),
        bytes_pulled=bytes_pulled,
    )


def make_invite(contact: Contact, request: MakeInvite, wall_time_s: Callable[[], float]) -> dict[str, Any]:
    """One line that lets others join: the run, and addresses of this peer and of others it can vouch for."""
    addresses = contact.known_addresses()
    expires = None if request.expires_s is None else int(wall_time_s()) + request.expires_s
    line = Invite(
        run=contact.run_id,
        addresses=tuple(addresses[: request.peers]),
        swarm_key=contact.swarm_key,
        expires_unix_s=expires,
    ).format()
    return {"invite": line, "secret": contact.swarm_key is not None, "expires_unix_s": expires}


def make_advert(contact: Contact, request: MakeAdvert, wall_time_s: Callable[[], float]) -> dict[str, Any]:
    """One signed line for a list of swarms. Raises GossamerError in a private one."""
    return {"advert": contact.advert(request.about, int(wall_time_s()) + request.expires_s).line()}


def tell_adverts(contact: Contact) -> dict[str, Any]:
    """The lines that anybody who asks is told, as text; none where the node takes no part in this."""
    told = contact.adverts.told() if contact.adverts is not None else []
    return {"adverts": [line.decode() for line in told]}


def show_spec(contact: Contact) -> dict[str, Any]:
    """The run spec as TOML, and the hash of its canonical bytes."""
    return {
        "toml": spec_as_toml(contact.spec),
        "run_id": contact.run_id.hex(),
        "canonical_bytes": len(canonical_bytes(contact.spec)),
    }
