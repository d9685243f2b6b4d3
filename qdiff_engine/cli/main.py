"""``qdiff``: the group of commands, and what an error, Ctrl-C or a closed pipe becomes."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import click

from ..version import __version__
from .output import Output, describe

_COMMANDS = {  # name -> module of this package; imported when it is asked for
    "demo": "demo",
    "calibrate": "artifacts",
    "inspect": "artifacts",
    "sample": "running",
    "compare": "running",
    "report": "reporting",
    "bops": "artifacts",
    "bench": "running",
    "doctor": "doctor",
}
_INTERRUPTED, _CLOSED_PIPE = 130, 141


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return getattr(importlib.import_module(f".{_COMMANDS[cmd_name]}", __package__), cmd_name)


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qdiff-engine")
@click.pass_context
def qdiff(ctx: click.Context) -> None:
    """Integer inference for diffusion UNets: calibrate, inspect, sample, compare, count, time.

    MODEL is a diffusers folder or the word "demo", ART the folder of an artifact. Start with: qdiff demo
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only on success, 2 for wrong usage, 130 after Ctrl-C, else 1."""
    output = Output()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", message="the model's corrections")
            warnings.showwarning = lambda message, *_, **__: click.echo(f"qdiff: warning: {message}", err=True)
        return _run(output, arguments)


def _run(output: Output, arguments: Sequence[str] | None) -> int:
    try:
        status = qdiff.main(arguments, prog_name="qdiff", standalone_mode=False, obj=output)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        return _fail(output, error, f"{error.format_message()}{_help_hint(error)}", error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        return _fail(output, error, f"interrupted; {output.resume}", _INTERRUPTED)
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # what the reader of our pipe did not want goes nowhere at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except MemoryError as error:
        return _fail(output, error, "out of memory; use a smaller --batch", 1)
    except (ValueError, TypeError, OSError) as error:
        return _fail(output, error, describe(error), 1)
    except Exception as error:  # a defect of ours, or a foreign one: still one line
        kind = type(error).__name__
        return _fail(output, error, f"{kind}: {describe(error)} (run again with --debug for the traceback)", 1)


def _fail(output: Output, error: BaseException, message: str, status: int) -> int:
    if output.debug:
        traceback.print_exception(error)
    click.echo(f"qdiff: {' '.join(message.split())}", err=True)
    return status


def _help_hint(error: click.ClickException) -> str:
    context: Any = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""
