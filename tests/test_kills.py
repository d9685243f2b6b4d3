"""kill -9 at random moments of a whole calibration: whatever was finished, the same command ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import networks

KILLS = 10
FILES = ("config.json", "graph.json", "model.safetensors")
STAGES = (
    "--recipe w4a4 --steps 3 --samples 2 --observer minmax --equalise on --weights adaround --learn-iterations 2 "
    "--learn-samples 3 --step-sizes learnt --align accuquant:2 --align-iterations 60 --align-batch 1 --align-rounding "
    "--correct mmse+ibc+ivc --correct-samples 16 --threads 1"
)

# one process imports everything and forks, so that a kill falls into the work, not into the imports
_CHILDREN = """
import json, os, random, shutil, signal, sys, time
import diffusers, torch, qdiff_engine
from qdiff_engine.cli import main
from qdiff_engine.models import load_model
from qdiff_engine.correction import estimation
from qdiff_engine.quantization import quantize
model, folder, kills, arguments = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split()
quiet = os.open(os.devnull, os.O_WRONLY)

def calibrate(name, seconds=None):
    start, child = time.monotonic(), os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(quiet, stream)
        os._exit(main(["calibrate", model, *arguments, "--out", os.path.join(folder, name)]))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start

status, took = calibrate("whole")
assert status == 0
moments, found = random.Random(1), []
while len(found) < kills:
    name = str(len(found))
    killed, _ = calibrate(name, (len(found) + moments.random()) / kills * took)  # one in every tenth of a run
    if killed != -signal.SIGKILL:  # done before its moment: not a kill
        shutil.rmtree(os.path.join(folder, name))
        continue
    partial = os.path.join(folder, f"{name}.partial")
    stages = sorted(os.listdir(partial)) if os.path.isdir(partial) else []
    found.append([stages, calibrate(name)[0]])
print(json.dumps(found))
"""


def test_a_calibration_killed_at_any_moment_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """A kill in every tenth of a run, each followed by the same command; most fall into rounding and alignment.

    The corrections are a run's last moments, which kills may miss; test_noise.py interrupts them.
    """
    networks.unet2d().save_pretrained(tmp_path / "model" / "unet")
    networks.ddim().save_pretrained(tmp_path / "model" / "scheduler")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILDREN, str(tmp_path / "model"), str(tmp_path), str(KILLS), STAGES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [resumed for _, resumed in found] == [0] * KILLS
    assert {"weights", "align"} <= {name for stages, _ in found for name in stages}, "kills fell into those stages, too"
    for i in range(KILLS):
        assert not (tmp_path / f"{i}.partial").exists()
        for name in FILES:
            assert (tmp_path / str(i) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
