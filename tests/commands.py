"""Commands of `qdiff`, started in a process of their own or run in this one, and what they printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = ["--steps", "6", "--samples", "2", "--observer", "minmax"]
DEMO = ["demo", "--steps", "3", "--samples", "1", "--n", "2"]
Run = Callable[..., tuple[int, str, str]]  # `qdiff` with these arguments, in this process; see the fixture


def loaded(result: tuple[int, str, str]) -> dict[str, Any]:
    """The JSON object on standard output, which holds one line and nothing else."""
    status, out, error = result
    assert status == 0, error
    assert out.endswith("\n") and out.count("\n") == 1
    return json.loads(out)


def refused(result: tuple[int, str, str], *parts: str) -> str:
    """The single line on standard error of a command that failed, checked to hold ``parts``."""
    status, out, error = result
    lines = error.strip().splitlines()
    assert status not in (0, 130) and out == "" and len(lines) == 1, error
    assert lines[0].startswith("qdiff: ") and "Traceback" not in error
    assert all(part in lines[0] for part in parts), lines[0]
    return lines[0]


def start(*arguments: Any, folder: Path) -> subprocess.Popen[str]:
    """A command in a process of its own, outside the source tree."""
    package = Path(sys.modules["qdiff_engine"].__file__ or "").parent.parent
    paths = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import sys; from qdiff_engine.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": paths}
    # a shell's background jobs ignore Ctrl-C, and their children with them
    return subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=_heed_ctrl_c, **pipes)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
