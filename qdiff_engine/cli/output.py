"""What a command writes: one result on standard output (text or one JSON object), progress and errors elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import click

Advance = Callable[..., None]  # (what is being done now: str, shown in place of the description; units done: int)

_MENDS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@dataclass
class Output:
    """How this run of the command talks: ``json`` and ``debug`` are its flags, ``stdout`` where its result goes."""

    json: bool = False
    debug: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    resume: str = "run the same command again"  # what to do after Ctrl-C

    def result(self, data: dict[str, Any], show: Callable[[Any], None]) -> None:
        """Write ``data`` as one JSON object, or let ``show`` print it for people on a rich console."""
        if self.json:
            from ..runtime.canonical_json import dump_line

            print(dump_line(data), file=self.stdout, flush=True)
        else:
            show(console_on(self.stdout))

    def note(self, text: str) -> None:
        """One line on standard error."""
        click.echo(text, err=True)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Advance]:
        """A progress bar on standard error, if that is a terminal; call what it yields once per unit of work done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = console_on(sys.stderr)
        columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, Remaining(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(description, total=total)
            yield lambda now=description, done=1: bar.update(task, advance=done, description=now)


def console_on(file: TextIO) -> Any:
    """A rich console; a reader that closed the pipe is an error like any other, not the end of the process."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Plain(file=file, highlight=False, markup=False)


def describe(error: BaseException) -> str:
    """An error as one line that names the cause, and for a system error the mend."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{os.fspath(error.filename)}: " if isinstance(error.filename, str | os.PathLike) else ""
        mend = _MENDS.get(error.errno)
        return _one_line(f"{where}{error.strerror}{'; ' + mend if mend else ''}")
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def megabytes(size: float) -> str:
    """``size`` bytes for people."""
    return f"{size / 1e6:.2f} MB"
