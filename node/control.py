"""The control socket: how the command line talks to the daemon on the same machine, and nobody else does.

Owns the requests a daemon answers and their JSON form. One connection carries one request and one reply, each
one line of at most ``Limits.control_line_bytes_max`` bytes:

    {"method": "stop", "params": {"now": false}}
    {"result": ...}    or    {"error": {"code": ..., "what": ..., "why": ..., "fix": ...}}

The socket is a unix socket with mode 0600 in a private folder; there is no TCP. An exception in a handler
costs that request and never the daemon. Stale sockets are replaced: whoever serves holds the home's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import structlog
import trio
from msgspec import Meta

from p2p.errors import GossamerError
from p2p.limits import Limits

T = TypeVar("T")
LIMITS = Limits()
log = structlog.get_logger()


class NoDaemon(GossamerError):
    """Nobody listens on the control socket of this home."""


class ControlError(GossamerError):
    """The daemon declined a request; ``code`` is the class name of the error it raised."""

    def __init__(self, code: str, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.code = code


# --- what can be asked --------------------------------------------------------------------------------------


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all requests' parameters."""


class GetStatus(Params, frozen=True):
    """``status`` -> NodeStatus (node.status)."""


class Stop(Params, frozen=True):
    """``stop`` -> {}: finish, checkpoint, say goodbye, exit; with ``now``, exit at once."""

    now: bool = False


class HandOver(Params, frozen=True):
    """``hand_over`` -> {settled}: let a merge under way end, then stop, for another process to go on in this home.

    ``settled`` is false when the merge had not ended ``wait_s`` later; the node stops all the same.
    """

    wait_s: Annotated[float, Meta(ge=0, le=600)]


class MergeNow(Params, frozen=True):
    """``merge_now`` -> MergeReport, once the merge is committed."""


class ForetellMerge(Params, frozen=True):
    """``foretell_merge`` -> Foretold: what a merge would come to; adopts nothing, and pulls everybody's weights."""

    bytes_max: Annotated[int, Meta(ge=1)] = 1 << 16


class Export(Params, frozen=True):
    """``export`` -> {path, bytes, weights_hash}: write the weights as a safetensors file."""

    path: str
    dtype: Literal["fp32", "bf16"] = "fp32"
    which: Literal["anchor", "live"] = "anchor"


class Evaluate(Params, frozen=True):
    """``evaluate`` -> {loss, unit, held_out_bytes, held_out_digest}: held-out loss in nats per unit."""

    which: Literal["anchor", "live"] = "live"
    bytes_max: Annotated[int, Meta(ge=1)] | None = None


class Sample(Params, frozen=True):
    """``sample`` -> {text}: let the model go on after ``prompt`` for ``count`` bytes."""

    prompt: str = ""
    count: Annotated[int, Meta(ge=1, le=65536)] = 400
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.8
    which: Literal["anchor", "live"] = "live"


EXPIRES_S_MAX = 100 * 365 * 86400


class MakeInvite(Params, frozen=True):
    """``invite`` -> {invite, secret, expires_unix_s}: a line that lets others join, naming up to ``peers`` addresses.

    ``secret``: whether it has the key of a private swarm in it.
    """

    peers: Annotated[int, Meta(ge=1, le=8)] = 3
    expires_s: Annotated[int, Meta(ge=1, le=EXPIRES_S_MAX)] | None = None


class MakeAdvert(Params, frozen=True):
    """``advert`` -> {advert}: a signed line for a list of swarms, with an address of a few members."""

    expires_s: Annotated[int, Meta(ge=1, le=EXPIRES_S_MAX)]
    about: Annotated[str, Meta(max_length=200)] = ""


class GetAdverts(Params, frozen=True):
    """``adverts`` -> {adverts}: the signed lines of swarms that the node holds for others, its own first."""


class GetSpec(Params, frozen=True):
    """``spec`` -> {toml, run_id}: the run spec this node works on."""


class GetLogs(Params, frozen=True):
    """``logs`` -> list of LogStatus: one-byte mode, every log that is held."""


class VerifyLogs(Params, frozen=True):
    """``verify_logs`` -> Verification: one-byte mode, check all that is held again."""


METHODS: Mapping[str, type[Params]] = {
    "status": GetStatus,
    "stop": Stop,
    "hand_over": HandOver,
    "merge_now": MergeNow,
    "foretell_merge": ForetellMerge,
    "export": Export,
    "evaluate": Evaluate,
    "sample": Sample,
    "invite": MakeInvite,
    "advert": MakeAdvert,
    "adverts": GetAdverts,
    "spec": GetSpec,
    "logs": GetLogs,
    "verify_logs": VerifyLogs,
}

Handler = Callable[[Any], Awaitable[object]]
"""Takes the method's Params and returns a struct or plain data; a GossamerError it raises reaches the caller."""


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")


# --- the daemon's side --------------------------------------------------------------------------------------


async def serve_control(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    methods: Mapping[str, type[Params]] = METHODS,
    limits: Limits = LIMITS,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on the unix socket ``path`` until cancelled, and remove the socket then.

    Call it through ``nursery.start``; it must only run under the home's lock.
    """
    answer = partial(_answer, handlers, methods, limits)
    clients = trio.CapacityLimiter(limits.control_clients_max)

    async def serve_client(stream: trio.SocketStream) -> None:
        try:
            clients.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await answer(stream)
        finally:
            clients.release_on_behalf_of(stream)

    with _listening(path, backlog=limits.control_clients_max) as listener:
        async with listener:
            task_status.started()
            await trio.serve_listeners(serve_client, [listener])


@contextlib.contextmanager
def _listening(path: Path, *, backlog: int) -> Iterator[trio.SocketListener]:
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(path))
        path.chmod(
            0o600
        )  # nobody can connect between the two: the folder is private, and nothing listens yet
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise GossamerError(
            f"cannot listen on {path}: {error.strerror}",
            why="without its control socket a node can only be killed, not asked",
            fix="name a shorter or another home: --home PATH",
        ) from error
    sock.setblocking(False)
    try:
        yield trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    finally:
        path.unlink(missing_ok=True)


async def _answer(
    handlers: Mapping[str, Handler],
    methods: Mapping[str, type[Params]],
    limits: Limits,
    stream: trio.SocketStream,
) -> None:
    with trio.move_on_after(limits.stream_timeout_s) as reading:
        line = await _read_line(stream, limits.control_line_bytes_max)
    if reading.cancelled_caught:
        return
    reply: dict[str, object]
    try:
        request = msgspec.json.decode(line, type=_Request)
        if request.method not in methods or request.method not in handlers:
            raise ValueError(f"unknown method {request.method!r}; there are {', '.join(handlers)}")
        params = msgspec.json.decode(request.params, type=methods[request.method])
        reply = {"result": await handlers[request.method](params)}
    except GossamerError as error:
        code = error.code if isinstance(error, ControlError) else type(error).__name__
        reply = _error_reply(code, error.what, error.why, error.fix)
    except (msgspec.MsgspecError, ValueError) as error:
        reply = _error_reply("BadRequest", f"not a request: {error}")
    except Exception as error:
        log.exception("control request failed")
        reply = _error_reply("InternalError", f"{type(error).__name__}: {error}", "this is a bug in gossamer")
    with trio.move_on_after(limits.stream_timeout_s):
        await stream.send_all(msgspec.json.encode(reply) + b"\n")


def _error_reply(code: str, what: str, why: str = "", fix: str = "") -> dict[str, object]:
    return {"error": {"code": code, "what": what, "why": why, "fix": fix}}


# --- the command line's side --------------------------------------------------------------------------------


async def ask(
    path: Path,
    method: str,
    params: Params | None = None,
    *,
    result_type: type[T] = dict,  # type: ignore[assignment]
    timeout_s: float = 30.0,
    limits: Limits = LIMITS,
) -> T:
    """The daemon's answer to ``method``.

    Raises NoDaemon when nobody listens, ControlError when the daemon declined or did not answer in time.
    """
    try:
        with trio.fail_after(timeout_s):
            async with await trio.open_unix_socket(os.fspath(path)) as stream:
                await stream.send_all(msgspec.json.encode({"method": method, "params": params or {}}) + b"\n")
                line = await _read_line(stream, limits.control_line_bytes_max)
    except trio.TooSlowError as error:
        raise ControlError(
            "Timeout",
            f"the node did not answer {method} within {timeout_s:g} s",
            why="it is overloaded or stuck",
            fix="look at its log; stop it at once with: gossamer stop --now",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
            raise GossamerError(
                f"cannot open the control socket {path}: {error.strerror}",
                why="only the user that runs the node may talk to it",
            ) from error
        raise NoDaemon(
            "no node is running in this home",
            why=f"nobody listens on {path}",
            fix="start one: gossamer run    or name the home it runs in: --home PATH",
        ) from error
    except trio.BrokenResourceError:
        line = b""
    if not line:
        raise ControlError("Gone", "the node went away before it answered", fix="gossamer status")
    reply = msgspec.json.decode(line)
    if "error" in reply:
        raise ControlError(**reply["error"])
    return msgspec.convert(reply["result"], result_type)


def call(
    path: Path,
    method: str,
    params: Params | None = None,
    *,
    result_type: type[T] = dict,  # type: ignore[assignment]
    timeout_s: float = 30.0,
) -> T:
    """``ask`` for programs that have no event loop of their own."""
    return trio.run(partial(ask, path, method, params, result_type=result_type, timeout_s=timeout_s))


async def _read_line(stream: trio.SocketStream, bytes_max: int) -> bytes:
    """Bytes up to the first newline, without it; empty when the other side said nothing or too much."""
    received = bytearray()
    while len(received) <= bytes_max:
        chunk = await stream.receive_some()
        if not chunk:
            return b""
        received += chunk
        if chunk.endswith(b"\n"):
            return bytes(received[:-1])
    return b""
