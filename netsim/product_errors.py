"""What goes wrong within the product: exceptions in one line, and whatever it logs as an error.

Owns the log while a simulation runs: nothing is printed, and an error is a failure, for nothing that a peer or a disk
does may be one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import structlog


def told(error: BaseException) -> str:
    """The innermost exceptions of a group, in one line."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(told(inner) for inner in error.exceptions)
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" ({last.tb_frame.f_code.co_filename.rpartition('/')[2]}:{last.tb_lineno})" if last else ""
    return f"{type(error).__name__}: {error}{where}"


@contextlib.contextmanager
def errors_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Within, whatever the product logs as an error is told; nothing is printed."""

    def refuse(_: Any, level: str, entry: Any) -> Any:
        if level in ("error", "critical", "exception"):
            tell(f"{entry.get('event')}: { {key: value for key, value in entry.items() if key != 'event'} }")
        raise structlog.DropEvent

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            tell(record.getMessage() + (f": {told(error)}" if error is not None else ""))

    before = structlog.get_config()
    structlog.configure(
        processors=[refuse], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR)
    )
    handler = Handler(logging.ERROR)
    root = logging.getLogger("p2p")
    propagated, root.propagate = root.propagate, False
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.propagate = propagated
        structlog.configure(**before)
