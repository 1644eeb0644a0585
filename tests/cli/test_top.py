"""``gossamer top``: what it draws, and how it behaves on a terminal, in a pipe, and when the node goes away."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import msgspec
import pytest
from rich.console import Console

from cli.exit_codes import ExitCode
from cli.top_view import BARS, SAMPLES_MAX, SPEED_SAMPLES, History, curve, moment_line, screen
from node.home import Home
from node.status import NodeStatus, PeerStatus
from tests.cli import fake_node
from tests.cli.fake_node import RECORDS, FakeNode, status_of

SECONDS_MAX = 60.0
"""For what takes one or two, on a machine that does much else."""
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"


def drawn(statuses: list[NodeStatus], *, width: int = 110, height: int = 30, remark: str = "") -> list[str]:
    """The lines of the screen after ``statuses``, as a terminal of that size shows them."""
    history = History()
    moments = [history.add(status) for status in statuses]
    console = Console(width=width, height=height, record=True, file=io.StringIO(), emoji=False)
    console.print(screen(moments[-1], history, width=width, height=height, remark=remark))
    return [line.rstrip() for line in console.export_text().splitlines()]


def course(length: int) -> list[NodeStatus]:
    """A node each second: its loss falls, it sends a MiB and receives half of that."""
    return [
        status_of(
            0,
            uptime_s=75.0 + second,
            loss=4.0 - second / 100,
            bytes_sent=second << 20,
            bytes_received=second << 19,
        )
        for second in range(length)
    ]


def member(number: int, **changes: object) -> PeerStatus:
    return msgspec.structs.replace(status_of(0).peers[0], peer=f"12D3KooW{number:044}", **changes)


def test_a_curve_goes_from_the_lowest_bar_to_the_highest() -> None:
    assert curve([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert curve([7, 0], 8) == BARS[-1] + BARS[0]
    assert curve([5, 5, 5], 8) == BARS[0] * 3
    assert curve([], 8) == ""
    assert curve([1, 2], 8, low=0.0) == BARS[4] + BARS[-1]


def test_a_long_curve_shows_all_of_it_in_the_cells_there_are() -> None:
    falling = [float(1000 - index) for index in range(1000)]
    assert curve(falling, 8) == BARS[::-1]
    assert len(curve(falling, 48)) == 48
    assert len(curve(falling[:49], 48)) == 48


def test_traffic_is_what_the_last_seconds_came_to() -> None:
    history = History()
    for status in course(SPEED_SAMPLES + 10):
        moment = history.add(status)
    assert moment.bytes_sent_per_s == pytest.approx(1 << 20)
    assert moment.bytes_received_per_s == pytest.approx(1 << 19)
    assert history.speeds(3) == ([1 << 20] * 3, [1 << 19] * 3)
    # Two snapshots of one moment tell nothing, and divide nothing by nothing.
    assert history.add(status).bytes_sent_per_s > 0
    assert History().add(status).bytes_sent_per_s == 0


def test_a_node_that_was_restarted_begins_a_new_history() -> None:
    history = History()
    for status in course(10):
        history.add(status)
    moment = history.add(status_of(0, uptime_s=1.0, bytes_sent=5, loss=3.0))
    assert (moment.bytes_sent_per_s, history.seconds(), history.losses()) == (0.0, 0.0, [3.0])


def test_what_is_remembered_is_bounded() -> None:
    history = History()
    for status in course(SAMPLES_MAX + 5):
        history.add(status)
    assert len(history.losses()) == SAMPLES_MAX


def test_the_screen_shows_the_node_its_course_and_its_members() -> None:
    text = "\n".join(drawn(course(60)))
    for part in (
        "q leaves",
        "node-1 (AAAAAAAA)",
        "step 50 of 100",
        "loss 3.4100",
        "4.0000 .. 3.4100 in 59s",
        "1.0 MiB/s up",
        "512.0 KiB/s down",
        "2 alive   1 connected",
        "BBBBBBBB",
    ):
        assert part in text


def test_who_has_just_fallen_silent_stands_first() -> None:
    members = [member(1), member(2, state="suspect", connected=False, last_problem="broken"), member(3)]
    lines = drawn([status_of(0, peers=members)])
    (head,) = [number for number, line in enumerate(lines) if line.startswith("peer")]
    assert lines[head + 1].split()[:3] == ["00000002", "suspect", "no"]
    assert "2 alive, 1 suspect   2 connected" in "\n".join(lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 12), (200, 60), (64, 24)])
def test_a_large_swarm_fits_any_screen_and_says_what_is_left_out(width: int, height: int) -> None:
    members = [member(number, last_problem="stall: " + "too slow " * 20) for number in range(300)]
    lines = drawn([*course(50), status_of(0, uptime_s=200.0, peers=members)], width=width, height=height)
    above = [line for line in lines if not line.startswith("00000")]
    rows = len(lines) - len(above)
    assert rows >= 1
    # Only where there is not even room for the lines above the table does it go over.
    assert len(lines) <= max(height, len(above) + 1)
    assert f"and {300 - rows} more: gossamer peers" in lines[-1]
    assert max(map(len, lines)) <= width


def test_a_peers_words_are_shown_and_not_obeyed() -> None:
    hostile = "refused: \x1b[2J\x1b]0;owned\x07 [bold]x[/]\nsecond line"
    lines = drawn([status_of(0, peers=[member(1, last_problem=hostile)])], width=160)
    (row,) = [line for line in lines if line.startswith("00000001")]
    assert row.endswith("refused: �[2J�]0;owned� [bold]x[/] second line")


def test_one_byte_mode_shows_records_and_who_holds_the_same() -> None:
    members = [member(1, records=120, behind=3, influence=0.25, agrees=False)]
    lines = drawn([status_of(0, records=RECORDS, unit="token", peers=members)])
    assert "700 applied, 2 unsent, 3 waiting   3 logs, 1 forked" in "\n".join(lines)
    (row,) = [line.split() for line in lines if line.startswith("00000001")]
    assert row[7:11] == ["120", "3", "25.0%", "NO"]


def test_an_old_screen_says_why() -> None:
    assert "no node is running in this home" in drawn(course(3), remark="no node is running in this home")[0]


def test_a_line_for_where_there_is_no_terminal() -> None:
    history = History()
    for status in course(3):
        moment = history.add(status)
    assert moment_line(moment) == (
        " 1m17s  training  step 50/100  loss 3.9800  12,345 bytes/s  1 peers  up 2.0 MiB  down 1.0 MiB"
        "  1.0 MiB/s up  512.0 KiB/s down  2 alive"
    )


def obey_ctrl_c() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and so would be what the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_a_terminal() -> None:
    obey_ctrl_c()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def started(*arguments: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", "top", *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=obey_ctrl_c,
    )


def test_one_object_a_second_in_a_pipe(node: FakeNode) -> None:
    node.status = status_of(0, bytes_sent=7)
    with started("--json", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as top:
        moments = [json.loads(top.stdout.readline()) for _ in range(2)]
        top.send_signal(signal.SIGINT)
        assert top.wait(SECONDS_MAX) == ExitCode.INTERRUPTED
        assert top.stderr.read() == b""
    for moment in moments:
        assert moment["members"] == {"alive": 2, "suspect": 0, "gone": 0, "left": 0, "banned": 0}
        assert moment["status"]["bytes_sent"] == 7


def test_lines_without_a_terminal_end_with_their_reader(node: FakeNode) -> None:
    with started(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as top:
        assert b"step 50/100" in top.stdout.readline()
        top.stdout.close()
        top.wait(SECONDS_MAX)
        assert b"Traceback" not in top.stderr.read()


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_no_node_no_view(home: Home, arguments: tuple[str, ...]) -> None:
    with started(*arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as top:
        assert top.wait(SECONDS_MAX) == ExitCode.NO_DAEMON
        assert top.stdout.read() == b""


class Terminal:
    """A terminal with ``gossamer top`` on it."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
        self._theirs = theirs
        self.mode = termios.tcgetattr(theirs)
        self.shown = b""
        self._top = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli", "top"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=on_a_terminal,
            env=os.environ | {"TERM": "xterm-256color"},
        )

    def read_until(self, words: bytes) -> None:
        """Wait until ``words`` have been drawn since this was asked last."""
        deadline_s = time.perf_counter() + SECONDS_MAX
        while words not in self.shown:
            assert time.perf_counter() < deadline_s, self.shown
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += os.read(self._ours, 65536)
        self.shown = self.shown.partition(words)[2]

    def press(self, keys: bytes) -> int:
        """The exit code that ``keys`` lead to."""
        os.write(self._ours, keys)
        self.read_until(LEAVE_SCREEN)
        return self._top.wait(SECONDS_MAX)

    def mode_now(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        self._top.kill()
        self._top.wait()
        os.close(self._theirs)
        os.close(self._ours)


@pytest.fixture
def terminal(node: FakeNode) -> Iterator[Terminal]:
    with contextlib.closing(Terminal()) as terminal:
        yield terminal


@pytest.mark.parametrize(("keys", "code"), [(b"q", ExitCode.OK), (b"\x03", ExitCode.INTERRUPTED)])
def test_q_and_ctrl_c_leave_the_terminal_as_it_was(terminal: Terminal, keys: bytes, code: ExitCode) -> None:
    terminal.read_until(ENTER_SCREEN)
    terminal.read_until(b"q leaves")
    assert terminal.mode_now() != terminal.mode
    assert terminal.press(keys) == code
    assert terminal.mode_now() == terminal.mode


def test_a_node_that_goes_away_is_waited_for(home: Home) -> None:
    with contextlib.ExitStack() as stack:
        with fake_node.running(home):
            terminal = stack.enter_context(contextlib.closing(Terminal()))
            terminal.read_until(b"node-1")
        terminal.read_until(b"no node is running")
        with fake_node.running(home) as back:
            back.status = status_of(0, peers=[member(7)])
            terminal.read_until(b"00000007")
            assert terminal.press(b"q") == ExitCode.OK
