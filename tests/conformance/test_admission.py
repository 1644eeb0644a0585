"""Who is connected at all: private swarms and allow-lists, over both transports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2p.errors import NotAllowed, PeerUnreachable, SwarmKeyMismatch
from p2p.identity import Identity
from p2p.swarm_key import SwarmKey

if TYPE_CHECKING:
    from tests.conformance.conftest import World

OURS, THEIRS = SwarmKey(b"o" * 32), SwarmKey(b"t" * 32)
Clock = trio.abc.Clock | None


@pytest.mark.parametrize("key", [OURS, None])
async def test_the_same_key_connects_and_so_does_none(
    clock: Clock, world: World, key: SwarmKey | None
) -> None:
    near, far = await world.host(swarm_key=key), await world.host(swarm_key=key)
    await near.connect(far.local)
    assert near.peers() == {far.local.peer}
    assert near.traffic().connections_refused == far.traffic().connections_refused == {}


@pytest.mark.parametrize(
    ("dialler", "listener"),
    [(OURS, THEIRS), (OURS, None), (None, OURS)],
    ids=["other", "to none", "from none"],
)
async def test_another_key_does_not_connect(
    clock: Clock, world: World, dialler: SwarmKey | None, listener: SwarmKey | None
) -> None:
    near, far = await world.host(swarm_key=dialler), await world.host(swarm_key=listener)
    with trio.fail_after(world.limits.dial_timeout_s), pytest.raises(SwarmKeyMismatch, match="swarm"):
        await near.connect(far.local)
    assert near.peers() == far.peers() == frozenset()
    assert far.traffic().connections_refused == ({} if listener is None else {"swarm-key": 1})


async def test_who_is_not_on_the_list_does_not_get_in(clock: Clock, world: World) -> None:
    friend, stranger = Identity.generate(), Identity.generate()
    host = await world.host(allowed=[friend.peer])
    let_in, kept_out = await world.host(identity=friend), await world.host(identity=stranger)
    await let_in.connect(host.local)
    with pytest.raises(NotAllowed, match="it hung up when it knew who dials"):
        await kept_out.connect(host.local)
    assert host.peers() == {friend.peer}
    assert host.traffic().connections_refused == {"not-allowed": 1}
    with pytest.raises(PeerUnreachable, match="not on this node's allow-list"):
        await host.connect(kept_out.local)
    assert host.peers() == {friend.peer}
