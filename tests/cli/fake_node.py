"""A node's control socket without the node: real socket, canned answers, in a thread of its own."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import trio

from node.control import (
    Evaluate,
    Export,
    Handler,
    HandOver,
    MakeAdvert,
    MakeInvite,
    Sample,
    Stop,
    serve_control,
)
from node.home import Home
from node.status import (
    Foretold,
    LogStatus,
    MergeReport,
    MixReport,
    NodeStatus,
    PeerStatus,
    RecordStatus,
    Verification,
)
from p2p.errors import GossamerError

PEERS = [f"12D3KooW{letter * 44}" for letter in "ABC"]

MERGE = MergeReport(
    record="ab" * 32,
    height=1,
    contributors=PEERS,
    weights_hash="cd" * 32,
    contributed=True,
    loss_before=2.5,
    loss_merged=2.25,
    duration_s=0.5,
)

RECORDS = RecordStatus(
    applied=700,
    waiting=3,
    unsent=2,
    duplicates=5,
    logs=3,
    forked=1,
    log="aa" * 32,
    vector="bb" * 32,
    state="cc" * 32,
    agree=2,
    ceiling=21.5,
)

VERIFIED = Verification(
    batches=12,
    records=300,
    settled=0,
    state="1f" * 32,
    counts_alike=True,
    comes_back=True,
    damaged=[],
)


def status_of(index: int, **changes: object) -> NodeStatus:
    """The status of the ``index``-th of PEERS, half way through a run unless ``changes`` say otherwise."""
    values: dict[str, object] = {
        "peer": PEERS[index],
        "name": f"node-{index + 1}",
        "version": "0.1.0",
        "pid": 4000 + index,
        "uptime_s": 75.0,
        "addresses": [f"/ip4/127.0.0.1/tcp/{4101 + index}/p2p/{PEERS[index]}"],
        "run_id": "0f" * 32,
        "run_name": "demo",
        "phase": "training",
        "problem": "",
        "device": "cpu",
        "parameters": 1_300_000,
        "step": 50,
        "steps_total": 100,
        "loss": 2.75,
        "tokens_per_s": 12_345.0,
        "tokens": 51_200,
        "mixes": 9,
        "mixes_failed": 1,
        "mixes_one_sided": 0,
        "last_mix": MixReport(
            rule="variance_corrected",
            fragment=0,
            peers=[PEERS[(index + 1) % 3]],
            step=45,
            variance_ratio_before=0.5,
            variance_ratio_after=1.0,
        ),
        "last_merge": None,
        "merges": 0,
        "bytes_sent": 3 << 20,
        "bytes_received": 2 << 20,
        "peers": [_peer(peer) for peer in PEERS if peer != PEERS[index]],
        "refusals": {},
        "checkpoint_step": 40,
        "disk_bytes": 5 << 20,
    }
    return NodeStatus(**(values | changes))  # type: ignore[arg-type]


def _peer(peer: str) -> PeerStatus:
    return PeerStatus(
        peer=peer,
        state="alive",
        connected=peer != PEERS[2],
        addresses=["/ip4/127.0.0.1/tcp/4102"],
        step=49,
        loss=2.8,
        heard_s_ago=0.4,
        head_height=0,
        standing=100.0,
        last_problem="" if peer != PEERS[2] else "hash",
        bytes_pulled=1 << 20,
    )


class FakeNode:
    """Answers like a node, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.logs: list[LogStatus] = []
        self.adverts: list[str] = []
        self.verification = VERIFIED
        self.foretold = Foretold(losses={PEERS[0]: 2.25, PEERS[1]: 2.75}, local=2.5, merged=2.25)
        self.status = status_of(0, refusals={"hash": 2}, problem="1 peer is banned: wait")

    def handlers(self) -> dict[str, Handler]:
        """All methods but ``spec``."""
        return {
            "status": self._get_status,
            "stop": self._record,
            "hand_over": self._hand_over,
            "merge_now": self._merge_now,
            "foretell_merge": self._foretell,
            "export": self._export,
            "evaluate": self._evaluate,
            "sample": self._sample,
            "invite": self._invite,
            "advert": self._advert,
            "adverts": self._adverts,
            "logs": self._logs,
            "verify_logs": self._verify,
        }

    async def _get_status(self, _: object) -> object:
        return self.status

    async def _record(self, params: Stop) -> object:
        self.asked.append(params)
        return {}

    async def _hand_over(self, params: HandOver) -> object:
        self.asked.append(params)
        return {"settled": False}

    async def _merge_now(self, _: object) -> object:
        return MERGE

    async def _foretell(self, _: object) -> object:
        return self.foretold

    async def _export(self, params: Export) -> object:
        if params.which == "anchor":
            raise GossamerError("there is no merged model yet", why="none was made", fix="gossamer merge now")
        self.asked.append(params)
        return {"path": params.path, "bytes": 5 << 20, "weights_hash": "ef" * 32}

    async def _evaluate(self, params: Evaluate) -> object:
        self.asked.append(params)
        return {
            "loss": 2.125,
            "unit": "byte",
            "held_out_bytes": params.bytes_max or 262_144,
            "held_out_digest": "aa" * 32,
        }

    async def _sample(self, params: Sample) -> object:
        self.asked.append(params)
        return {"text": "[red]self[/red] = None"}

    async def _logs(self, _: object) -> object:
        return self.logs

    async def _verify(self, _: object) -> object:
        return self.verification

    async def _advert(self, params: MakeAdvert) -> object:
        self.asked.append(params)
        return {"advert": '{"claim":{"name":"fake"}}'}

    async def _adverts(self, _: object) -> object:
        return {"adverts": self.adverts}

    async def _invite(self, params: MakeInvite) -> object:
        self.asked.append(params)
        return {
            "invite": "gossamer:join/1/abc?peer=/ip4/127.0.0.1/tcp/1/p2p/X&check=00",
            "secret": self.status.private,
            "expires_unix_s": None if params.expires_s is None else 1_900_000_000,
        }


@contextlib.contextmanager
def running(home: Home) -> Iterator[FakeNode]:
    """A FakeNode on ``home``'s control socket."""
    node, ready, token, scope = FakeNode(), threading.Event(), [], trio.CancelScope()

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve_control, home.control_socket, node.handlers()))
                ready.set()

    home.create()
    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    ready.wait(5)
    try:
        yield node
    finally:
        trio.from_thread.run_sync(scope.cancel, trio_token=token[0])
        thread.join(5)
