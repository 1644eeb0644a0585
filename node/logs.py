"""Logging: one structlog set-up for the whole process, as console lines for people or JSON lines for machines.

Owns where log lines go and how they look; what is worth a line is decided where it happens. Peer ids are cut
to their last eight characters on a console and kept whole in JSON. Warnings of libraries that use the
standard library's logging come out of the same door.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import IO, Any

import structlog

from node.config import ConfigError, NodeConfig

_PEER_ID = re.compile(r"\b12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\b")


STDERR_FILENO = 2


class LogSink:
    """Where lines are written: standard error, or a file that ``reopen`` opens anew after it was moved."""

    def __init__(self, file: Path | None) -> None:
        self._path = file
        self._stream = self._open()

    def write(self, text: str) -> int:
        """Write ``text`` as it is."""
        return self._stream.write(text)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person is looking at it."""
        return self._stream.isatty()

    def reopen(self) -> None:
        """Open the log file again (SIGHUP, after a rotation); a no-op on standard error.

        Safe at any moment and in a signal handler: the stream stays as it is, and what it writes to is exchanged in one
        system call, so that a line being written lands whole in one of the two files. A file that cannot be opened
        leaves everything as it was, and is told of on standard error: a log is no reason to die.
        """
        if self._path is None:
            return
        try:
            anew = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            text = f"cannot open {self._path} anew: {error.strerror}; logging goes on where it went before\n"
            os.write(STDERR_FILENO, text.encode(errors="replace"))
            return
        os.dup2(anew, self._stream.fileno(), inheritable=False)
        os.close(anew)

    def _open(self) -> IO[str]:
        if self._path is None:
            return sys.stderr
        try:
            return self._path.open("a", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"cannot open the log file {self._path}: {error.strerror}",
                why="a node that cannot say what it does is not started",
                fix=f"mkdir -p {shlex.quote(str(self._path.parent))}    or set another log_file in config.toml",
            ) from error


def set_up_logging(config: NodeConfig, *, color: bool = True) -> LogSink:
    """Send every log line of this process where and how ``config`` says."""
    sink = LogSink(config.log_file)
    as_json = config.log_format == "json" or (config.log_format == "auto" and not sink.isatty())
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json, key="ts"),
    ]
    if as_json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors += [
            shorten_peer_ids,
            # Plain tracebacks: the default prints every local variable, keys and weights included.
            structlog.dev.ConsoleRenderer(
                colors=color and sink.isatty(),
                timestamp_key="ts",
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sink),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[_ToStructlog()], force=True)
    return sink


def shorten_peer_ids(_logger: Any, _method: str, event: Any) -> Any:
    """A structlog processor: peer ids anywhere in the event become their last eight characters."""
    return {key: _shorten(value) for key, value in event.items()}


def short_peer(peer: str) -> str:
    """The last eight characters of a peer id: the part that tells two peers apart at a glance."""
    return peer[-8:]


def _shorten(value: object) -> object:
    if isinstance(value, str):
        return _PEER_ID.sub(lambda match: short_peer(match[0]), value)
    if isinstance(value, list | tuple):
        return [_shorten(item) for item in value]
    return value


class _ToStructlog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
        )
