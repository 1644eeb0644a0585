"""What every command shares: the options that work everywhere, and the one way results are printed.

Owns stdout (results: text, or one JSON object per line with ``--json``) and stderr (progress and errors). Colour and
motion are for terminals only, and never with ``--no-color`` or ``NO_COLOR``.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from node.control import Params
    from node.home import Home

T = TypeVar("T")
PANEL = "Everywhere"
WIDTH_WITHOUT_TERMINAL = 160

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="PATH", help="Keep everything of this node here.", rich_help_panel=PANEL),
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print JSON, one object per line.", rich_help_panel=PANEL)
]
QuietFlag = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=PANEL)
]
DebugFlag = Annotated[
    bool, typer.Option("--debug", help="Log everything; show tracebacks.", rich_help_panel=PANEL)
]
NoColorFlag = Annotated[
    bool, typer.Option("--no-color", help="Plain text, also on a terminal.", rich_help_panel=PANEL)
]


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command takes, before or after its name."""

    home_path: Path | None = None
    json: bool = False
    quiet: bool = False
    debug: bool = False
    no_color: bool = False

    @property
    def home(self) -> Home:
        """The home these options, or the environment, name."""
        from node.home import Home

        return Home.locate(self.home_path, os.environ)

    def out(self) -> Console:
        """For results."""
        return self._console(sys.stdout)

    def err(self) -> Console:
        """For progress and remarks; silent with ``--quiet``."""
        return self._console(sys.stderr, quiet=self.quiet)

    def print(self, result: object, text: RenderableType) -> None:
        """Print ``result``: itself as JSON with ``--json``, else as ``text``."""
        if self.json:
            sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
            sys.stdout.flush()
        else:
            self.out().print(text, soft_wrap=isinstance(text, str))

    def ask(
        self,
        method: str,
        params: Params | None = None,
        *,
        result_type: type[T] = dict,  # type: ignore[assignment]
        timeout_s: float = 30.0,
    ) -> T:
        """Ask the node that runs in this home."""
        from node.control import call

        return call(self.home.control_socket, method, params, result_type=result_type, timeout_s=timeout_s)

    def _console(self, stream: Any, *, quiet: bool = False) -> Console:
        plain = self.no_color or bool(os.environ.get("NO_COLOR"))
        width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
        return Console(file=stream, no_color=plain, highlight=False, quiet=quiet, width=width, emoji=False)


_COMMON_PARAMETERS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, default, annotation in [
        ("home_path", None, HomeOption),
        ("json", False, JsonFlag),
        ("quiet", False, QuietFlag),
        ("debug", False, DebugFlag),
        ("no_color", False, NoColorFlag),
    ]
]


def command(app: typer.Typer, name: str | None = None, **settings: Any) -> Callable[[T], T]:
    """Register ``function(common, ...)`` as a command whose ``common`` is filled from the common options."""

    def register(function: Any) -> Any:
        @functools.wraps(function)
        def run(ctx: typer.Context, **values: Any) -> None:
            before: Common = ctx.find_root().obj or Common()
            here = {parameter.name: values.pop(parameter.name) for parameter in _COMMON_PARAMETERS}
            merged = {key: value or getattr(before, key) for key, value in here.items()}
            function(Common(**merged), **values)

        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([context, *own, *_COMMON_PARAMETERS])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [context, *own, *_COMMON_PARAMETERS]}
        app.command(name, **settings)(run)
        return function

    return register


def remember_global_options(
    ctx: typer.Context,
    home_path: HomeOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
    no_color: NoColorFlag = False,
) -> None:
    """Callback of the root command: keep the options given before the command's name."""
    ctx.obj = Common(home_path, json, quiet, debug, no_color)
