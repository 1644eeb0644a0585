"""The control socket: requests, replies, refusals, and a daemon that survives every kind of client."""

import contextlib
import json
import stat
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from node.control import ControlError, NoDaemon, Sample, Stop, ask, serve_control
from node.status import MergeReport
from p2p.errors import GossamerError
from p2p.limits import Limits

LIMITS = Limits(control_line_bytes_max=4096, control_clients_max=2, stream_timeout_s=0.2)

MERGE = MergeReport(
    record="aa",
    height=1,
    contributors=["p"],
    weights_hash="bb",
    contributed=True,
    loss_before=2.5,
    loss_merged=2.25,
    duration_s=0.5,
)


async def stop(params: Stop) -> object:
    return {"now": params.now}


async def merge_now(_: object) -> object:
    return MERGE


async def sample(params: Sample) -> object:
    if params.prompt == "bug":
        raise RuntimeError("a bug")
    raise GossamerError("no weights yet", why="nothing was trained", fix="wait")


HANDLERS = {"stop": stop, "merge_now": merge_now, "sample": sample}


@pytest.fixture
async def path(tmp_path: Path, nursery: trio.Nursery) -> Path:
    socket_path = tmp_path / "control.sock"
    socket_path.write_text("left over by a daemon that was killed")
    await nursery.start(partial(serve_control, socket_path, HANDLERS, limits=LIMITS))
    return socket_path


async def exchange(path: Path, line: bytes) -> bytes:
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(line)
        await stream.send_eof()
        reply = b""
        while chunk := await stream.receive_some():
            reply += chunk
        return reply


async def test_a_request_and_its_typed_reply(path: Path) -> None:
    assert await ask(path, "stop", Stop(now=True)) == {"now": True}
    assert await ask(path, "stop") == {"now": False}
    assert await ask(path, "merge_now", result_type=MergeReport) == MERGE


async def test_the_socket_is_private_and_goes_with_its_server(tmp_path: Path) -> None:
    socket_path = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, socket_path, HANDLERS)
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        nursery.cancel_scope.cancel()
    assert not socket_path.exists()


async def test_an_error_keeps_its_three_parts_and_its_name(path: Path) -> None:
    with pytest.raises(ControlError, match="no weights yet") as caught:
        await ask(path, "sample", Sample(prompt="hello"))
    error = caught.value
    assert (error.code, error.why, error.fix) == ("GossamerError", "nothing was trained", "wait")


async def test_a_bug_in_a_handler_costs_one_request(path: Path) -> None:
    with pytest.raises(ControlError, match="RuntimeError: a bug"):
        await ask(path, "sample", Sample(prompt="bug"))
    assert await ask(path, "stop") == {"now": False}


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b'{"method": "format_disk"}\n',
        b'{"method": "stop", "params": {"now": "perhaps"}}\n',
        b'{"method": "stop", "params": {"later": true}}\n',
        b'{"method": "stop", "unknown": 1}\n',
        b'{"method": "sample", "params": {"count": 0}}\n',
        b"\n",
    ],
)
async def test_what_is_not_a_request_is_said_to_be_none(path: Path, line: bytes) -> None:
    reply = json.loads(await exchange(path, line))
    assert reply["error"]["code"] == "BadRequest"
    assert await ask(path, "stop") == {"now": False}


async def test_clients_that_hang_up_talk_too_much_or_say_nothing_cost_nothing(path: Path) -> None:
    assert b"error" in await exchange(path, b'{"method": "sto')
    with contextlib.suppress(trio.BrokenResourceError):  # it may be cut off before it has said it all
        await exchange(path, b"x" * 1_000_000)
    async with await trio.open_unix_socket(path) as silent:
        assert await silent.receive_some() == b""
    assert await ask(path, "stop") == {"now": False}


async def test_more_clients_than_the_bound_are_turned_away(path: Path) -> None:
    async with await trio.open_unix_socket(path), await trio.open_unix_socket(path):
        with pytest.raises(ControlError, match="went away"):
            await ask(path, "stop")
    await trio.testing.wait_all_tasks_blocked()
    assert await ask(path, "stop") == {"now": False}


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon) as caught:
        await ask(tmp_path / "absent.sock", "status")
    assert "gossamer run" in caught.value.fix


async def test_a_socket_without_its_daemon_is_nobody_too(tmp_path: Path) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(tmp_path / "stale.sock"))
    listener.close()
    with pytest.raises(NoDaemon):
        await ask(tmp_path / "stale.sock", "status")


async def test_a_daemon_that_does_not_answer(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def never(_: object) -> object:
        await trio.sleep_forever()

    await nursery.start(serve_control, tmp_path / "control.sock", {"status": never})
    with pytest.raises(ControlError, match="did not answer status"):
        await ask(tmp_path / "control.sock", "status", timeout_s=0.05)
    nursery.cancel_scope.cancel()
