"""Log lines: JSON for machines, short peer ids for people, and a file that can be rotated."""

import itertools
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import structlog

from node.config import ConfigError, NodeConfig
from node.logs import set_up_logging
from p2p.identity import Identity

PEER = Identity.generate().peer


@pytest.fixture(autouse=True)
def undo() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    root.handlers[:] = handlers


def test_json_keeps_everything(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(NodeConfig(log_format="json"))
    structlog.get_logger().info("peer up", peer=PEER, outbound=True)
    line = json.loads(capsys.readouterr().err)
    assert line.pop("ts").endswith("Z")
    assert line == {"event": "peer up", "level": "info", "peer": PEER, "outbound": True}


def test_the_console_shortens_peer_ids(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(NodeConfig(log_format="console"))
    structlog.get_logger().warning("peer down", peer=PEER, others=[PEER], reason=f"dial of {PEER} failed")
    text = capsys.readouterr().err
    assert PEER not in text
    assert text.count(PEER[-8:]) == 3


def test_the_level_holds_and_libraries_come_through(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(NodeConfig(log_format="json", log_level="warning"))
    structlog.get_logger().info("not worth a line")
    logging.getLogger("another.package").warning("disk is %s", "full")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["logger"]) for line in lines] == [("disk is full", "another.package")]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_failure_is_told_with_its_traceback_and_without_its_variables(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    set_up_logging(NodeConfig(log_format=log_format))

    def fail(secret: str) -> None:
        raise ValueError("too long" if len(secret) > 3 else "too short")

    try:
        fail(secret="".join(["open", "sesame"]))
    except ValueError:
        logging.getLogger("another.package").exception("the handler failed")
    text = capsys.readouterr().err
    for part in ("the handler failed", "Traceback (most recent call last)", "ValueError: too long"):
        assert part in text
    assert "opensesame" not in text


def test_a_rotated_file_is_opened_anew(tmp_path: Path) -> None:
    file = tmp_path / "node.log"
    sink = set_up_logging(NodeConfig(log_format="json", log_file=file))
    structlog.get_logger().info("before")
    file.rename(tmp_path / "node.log.1")
    sink.reopen()
    structlog.get_logger().info("after")
    assert json.loads((tmp_path / "node.log.1").read_text())["event"] == "before"
    assert json.loads(file.read_text())["event"] == "after"


def test_a_file_that_cannot_be_opened_anew_is_told_of_and_the_old_one_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    sink = set_up_logging(NodeConfig(log_format="json", log_file=tmp_path / "logs" / "node.log"))
    (tmp_path / "logs").rename(tmp_path / "away")
    sink.reopen()
    structlog.get_logger().info("still here")
    assert json.loads((tmp_path / "away" / "node.log").read_text())["event"] == "still here"
    assert "logging goes on where it went before" in capfd.readouterr().err


def test_a_log_file_in_a_folder_that_is_not_there_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        set_up_logging(NodeConfig(log_file=tmp_path / "logs" / "node.log"))
    assert f"mkdir -p {tmp_path / 'logs'}" in caught.value.fix


def test_no_line_of_any_thread_is_lost_or_torn_by_rotations(tmp_path: Path) -> None:
    """Lanes log from worker threads while the signal is handled in the main one."""
    file, writers, lines = tmp_path / "node.log", 3, 2_000
    sink = set_up_logging(NodeConfig(log_format="json", log_file=file))

    def write(writer: int) -> None:
        for number in range(lines):
            structlog.get_logger().info("line", writer=writer, number=number)

    with ThreadPoolExecutor(writers) as pool:
        pending = [pool.submit(write, writer) for writer in range(writers)]
        for rotation in itertools.count():
            if all(future.done() for future in pending):
                break
            file.rename(tmp_path / f"node.log.{rotation}")
            sink.reopen()
            wait(pending, timeout=0.01)
        for future in pending:
            future.result()
    assert rotation > 2
    told = [json.loads(line) for part in tmp_path.glob("node.log*") for line in part.open()]
    assert sorted((line["writer"], line["number"]) for line in told) == [
        (writer, number) for writer in range(writers) for number in range(lines)
    ]
