"""``gossamer log show`` and ``gossamer log verify``: what they print, as text and as JSON, and how they end."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from cli.exit_codes import ExitCode
from node.status import LogStatus
from tests.cli.fake_node import PEERS, VERIFIED, FakeNode

pytestmark = pytest.mark.usefixtures("home")
Gossamer = Callable[..., Any]

LOG = LogStatus(
    log="ab" * 16,
    author=PEERS[1],
    incarnation=7,
    batches=12,
    records=1234,
    waiting=55,
    clock=999,
    last="cd" * 32,
    forked=True,
)


def test_show_prints_every_log(gossamer: Gossamer, node: FakeNode) -> None:
    assert "no records yet" in gossamer("log", "show").out
    node.logs = [LOG, msgspec.structs.replace(LOG, author=PEERS[0], forked=False, records=9)]
    shown = gossamer("log", "show")
    assert shown.code == ExitCode.OK
    for part in (PEERS[1][-8:], "1,234", "55", "forked"):
        assert part in shown.out
    rows = json.loads(gossamer("log", "show", "--json").out)
    assert rows == msgspec.to_builtins(node.logs)


def test_verify_says_what_was_checked(gossamer: Gossamer, node: FakeNode) -> None:
    shown = gossamer("log", "verify")
    assert shown.code == ExitCode.OK
    for part in (
        "12 checked again",
        "300 records",
        "1f" * 32,
        "the same",
        "are the base weights",
        "all whole",
    ):
        assert part in shown.out
    assert json.loads(gossamer("log", "verify", "--json").out) == msgspec.to_builtins(VERIFIED)


@pytest.mark.parametrize(
    ("change", "text", "what"),
    [
        ({"counts_alike": False}, "DIFFERENT", "not what the records say"),
        (
            {"comes_back": False, "settled": 65_536},
            "ARE NOT the snapshot of 65,536",
            "not what the records say",
        ),
        ({"damaged": ["records/1-ab.cbor"]}, "records/1-ab.cbor damaged", "are damaged"),
    ],
)
def test_verify_ends_with_another_code_when_something_is_wrong(
    gossamer: Gossamer, node: FakeNode, change: dict[str, Any], text: str, what: str
) -> None:
    node.verification = msgspec.structs.replace(VERIFIED, **change)
    shown = gossamer("log", "verify")
    assert shown.code == ExitCode.CHECK_FAILED
    assert text in shown.out
    assert what in shown.err
    assert "fix" in shown.err
    as_json = gossamer("log", "verify", "--json")
    assert as_json.code == ExitCode.CHECK_FAILED
    assert json.loads(as_json.out) == msgspec.to_builtins(node.verification), "the finding, for programs too"
    error = json.loads(as_json.err)["error"]
    assert error["code"] == ExitCode.CHECK_FAILED
    assert what in error["what"]
    assert error["fix"]


@pytest.mark.parametrize("name", ["show", "verify"])
def test_without_a_running_node_they_say_so(gossamer: Gossamer, name: str) -> None:
    """They ask the node: the home of one that is stopped is not read behind its back."""
    stopped = gossamer("log", name)
    assert stopped.code == ExitCode.NO_DAEMON
    assert stopped.out == ""
    assert "no node is running" in stopped.err
    error = json.loads(gossamer("log", name, "--json").err)["error"]
    assert error["code"] == ExitCode.NO_DAEMON
    assert error["fix"]
