"""Benchmarks in sections: the result file is written whole after each, and a run that was cut short goes on.

A row remembers its section and the commit of its sources. Rows of another machine or library version are not added to,
nor those of another commit unless that is asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results_file
from qdiff_engine.baselines import first_line
from qdiff_engine.measuring import thread_count

Rows = list[dict[str, Any]]
_SAME = ("gpu", "cpu", "torch", "triton")  # what rows of one file have in common
_FRAMES = 6  # of a traceback, the innermost ones
_WHOLE = 0.9  # a section that had this share of the budget to itself does not fit into it


class OutOfTime(BaseException):
    """The time of a section is over; no ``except Exception`` between here and the section may swallow it."""


@dataclass(frozen=True)
class Section:
    """Rows that are measured together. ``seconds``: what is expected; with less left, it waits for the next run."""

    name: str
    measure: Callable[[], Rows]
    seconds: float = 10.0


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` inside after ``seconds``, by a signal: in the main thread, between two Python instructions."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def appended(rows: Rows, new: Rows) -> Rows:
    """The rows, then the new ones."""
    return rows + new


def earlier(path: Path, kind: str, machine: Mapping[str, Any], any_commit: bool = False) -> tuple[Rows, dict[str, Any]]:
    """(rows, {"sections": ..., "absent": ...}) of an earlier run that this one can go on with; empty otherwise.

    Args:
        any_commit: the sources may have changed since.

    Raises:
        ValueError: the file is not a result file of ``kind``.
    """
    if not path.exists():
        return [], {}
    document = json.loads(path.read_text(encoding="utf-8"))
    results_file.check(document, kind)
    found = document["machine"]
    same = _SAME if any_commit else (*_SAME, "commit")
    changed = [key for key in same if found.get(key) != machine.get(key)]
    if changed:
        print(f"{path.name} is of another {', '.join(changed)}: starting afresh", file=sys.stderr)
        return [], {}
    rows = [{"commit": found["commit"], **row} for row in document["rows"]]
    return rows, {key: found[key] for key in ("sections", "absent") if key in found}


def run(
    sections: Sequence[Section],
    options: Namespace,
    kind: str,
    machine: dict[str, Any],
    path: Path | None,
    merge: Callable[[Rows, Rows], Rows] = appended,
    clock: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> tuple[Rows, list[str]]:
    """Measure what is missing, within ``options.budget_seconds``.

    Args:
        machine: gets "sections" {name: seconds} and "absent" {name: reason}.
        path: the result file, written after every section; None writes nothing.
        merge: how a section's rows join the others.
        start: when the budget began, by ``clock``; now by default.

    Returns:
        All rows, and what went wrong, one line per section; a wrong section is measured again by the next run.
    """
    rows, known = ([], {}) if path is None or options.afresh else earlier(path, kind, machine, options.any_commit)
    machine |= {"sections": {}, "absent": {}} | known
    budget, start, ran, wrong = options.budget_seconds, clock() if start is None else start, False, []
    wanted = [section for section in sections if re.search(options.sections, section.name)]
    todo = [s for s in wanted if s.name not in machine["sections"] and s.name not in machine["absent"]]
    for i, section in enumerate(todo):
        began = clock()
        left = None if budget is None else budget - (began - start)
        if left is not None and (left <= 0 or (ran and left < section.seconds)):
            print(f"{len(todo) - i} sections wait for the next run, from {section.name} on", file=sys.stderr)
            break
        ran = True
        try:
            with time_limit(left):
                new = [{**row, "section": section.name, "commit": machine["commit"]} for row in section.measure()]
            rows = merge(rows, new)
        except OutOfTime:
            assert budget is not None and left is not None
            if left < _WHOLE * budget:
                print(f"{section.name} did not finish; the next run measures it first", file=sys.stderr)
                break
            machine["absent"][section.name] = f"did not finish in {left:.0f} s"
            print(f"{section.name}: {machine['absent'][section.name]}", file=sys.stderr)
        except Exception as error:  # compilers raise types of their own; what happened is told, and is the exit status
            wrong.append(f"{section.name}: {type(error).__name__}: {first_line(error)}")
            traceback.print_exc(limit=-_FRAMES)
        else:
            machine["sections"][section.name] = round(clock() - began, 1)
            print(f"{section.name}: {machine['sections'][section.name]} s", file=sys.stderr)
        if path is not None and rows:
            results_file.write(path, kind, machine, rows, quiet=True)
    if path is not None:
        print(f"{path}: {len(rows)} rows, {len(machine['sections'])} of {len(sections)} sections")
    return rows, wrong


def command(
    description: str | None,
    plan: Callable[[bool], Sequence[Section]],
    results: str,
    kind: str,
    title: str,
    columns: Sequence[str],
) -> int:
    """The command line of a benchmark on the CPU that runs section by section; the exit status.

    Args:
        plan: the sections, or with True those of a smoke run, which writes nothing.
        results: name of the result file; ``kind``: of its rows; ``title``, ``columns``: of the printed table.
    """
    parser = results_file.arguments(description, results)
    results_file.section_arguments(parser)
    options = parser.parse_args()
    path = options.out or (None if options.quick else results_file.RESULTS / results)
    with thread_count(options.threads):
        machine = results_file.machine(commit=options.commit)
        found, wrong = run(plan(options.quick), options, kind, machine, path)
    results_file.show(title, found, columns)
    return 1 if wrong else 0
