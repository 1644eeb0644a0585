"""``gossamer top``: the node that runs in this home, live, until q or Ctrl-C.

Owns the refreshing, the keys and the mode of the terminal, which is given back however the view ends. What is shown is
``cli.top_view``'s. A node that stops answering is said to, and waited for: whoever watches one wants to see it return.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from cli.common import Common
from cli.top_view import History, moment_line, screen

if TYPE_CHECKING:
    import trio

    from node.status import NodeStatus

REFRESH_S = 1.0
STATUS_TIMEOUT_S = 5.0
KEYS_READ_MAX = 64


def top(common: Common) -> None:
    """The node live on one screen: training, merges, traffic, members; q leaves. Lines where there is no terminal."""
    import trio

    out = common.out()
    if common.json or not out.is_terminal:
        trio.run(_print_lines, common)
    else:
        trio.run(_draw, common, out)


async def _look(common: Common) -> NodeStatus:
    from node.control import ask
    from node.status import NodeStatus

    return await ask(common.home.control_socket, "status", result_type=NodeStatus, timeout_s=STATUS_TIMEOUT_S)


async def _print_lines(common: Common) -> None:
    import trio

    history = History()
    while True:
        moment = history.add(await _look(common))
        common.print(moment, escape(moment_line(moment)))
        await trio.sleep(REFRESH_S)


async def _draw(common: Common, out: Console) -> None:
    import trio

    from p2p.errors import GossamerError

    history = History()
    moment = history.add(await _look(common))
    remark = ""
    with _keys_at_once(), Live(console=out, screen=True, auto_refresh=False) as live:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_leave_on_q, nursery.cancel_scope)
            while True:
                shown = screen(moment, history, width=out.width, height=out.height, remark=remark)
                live.update(shown, refresh=True)
                await trio.sleep(REFRESH_S)
                try:
                    moment, remark = history.add(await _look(common)), ""
                except GossamerError as error:
                    remark = error.what


async def _leave_on_q(scope: trio.CancelScope) -> None:
    import trio

    keyboard = sys.stdin.fileno()
    if not os.isatty(keyboard):
        return
    while True:
        await trio.lowlevel.wait_readable(keyboard)
        keys = os.read(keyboard, KEYS_READ_MAX)
        if not keys or b"q" in keys.lower():
            scope.cancel()


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    """Keys are read as they are pressed, and not shown; Ctrl-C stays what it is."""
    keyboard = sys.stdin.fileno()
    if not os.isatty(keyboard):
        yield
        return
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
