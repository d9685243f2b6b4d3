"""An interrupted save harms nothing: full disks, kill -9 anywhere, leftovers, folders that are in the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_artifact import assert_equal, contents, small_artifact

from qdiff_engine.runtime import files, tensor_file
from qdiff_engine.runtime.artifact import load_artifact, save_artifact


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests do to a process does not need the disk to be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("function", ["fsync", "mkdir", "rename", "open"])
@pytest.mark.parametrize("exchange", [True, False])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, exchange: bool) -> None:
    """ENOSPC at every call in turn: the old artifact stays whole, and nothing is left beside it."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    folder = tmp_path / "a"
    save_artifact(small_artifact(0), folder)
    original = getattr(os, function)
    failures = 0
    for fail_at in range(20):
        calls: list[int] = []

        def failing(*args: Any, calls: list[int] = calls, fail_at: int = fail_at, **kwargs: Any) -> Any:
            calls.append(len(calls))
            if calls[-1] == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            try:
                save_artifact(small_artifact(1), folder)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
        if len(calls) <= fail_at:
            break
        left = {path for path in os.listdir(tmp_path) if path != "a"}
        if function == "open":  # removing the old folder opens it; the next save tries again
            left = {path for path in left if not path.startswith(".a.saving-")}
        assert left <= ({"a.previous"} if not exchange else set())
        loaded = load_artifact(folder)
        assert loaded.key["seed"] in (0, 1)
        assert_equal(loaded, small_artifact(loaded.key["seed"]))
        for name in left:
            files.shutil.rmtree(tmp_path / name)
        save_artifact(small_artifact(0), folder)
        assert os.listdir(tmp_path) == ["a"]
    assert failures == calls_expected(function, exchange)


def calls_expected(function: str, exchange: bool) -> int:
    """How often a save calls a function of ``os``, so that no call escapes the test above."""
    return {"fsync": 5, "mkdir": 1, "rename": 0 if exchange else 3, "open": 2}[function]


def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real write error: the process may write files of 2 KiB at most."""
    save_artifact(small_artifact(0), tmp_path / "a")
    files.write_file(tmp_path / "state", b"old")
    script = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_artifact import small_artifact
from qdiff_engine.runtime import artifact, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
for attempt in (lambda: artifact.save_artifact(small_artifact(1, rows=50), {str(tmp_path / "a")!r}),
                lambda: files.write_file({str(tmp_path / "state")!r}, bytes(10000))):
    try:
        attempt()
    except OSError as error:
        print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(errno.EFBIG)] * 2, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a", "state"]
    assert_equal(load_artifact(tmp_path / "a"), small_artifact(0))
    assert (tmp_path / "state").read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_interrupted_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    save_artifact(small_artifact(0), tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "_bytes", lambda tensor: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            save_artifact(small_artifact(1), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert_equal(load_artifact(tmp_path / "a"), small_artifact(0))


def test_a_reader_never_mixes_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder has the name while the last file is opened, and the first one again afterwards."""
    for name in ("a", "b"):
        save_artifact(small_artifact(0 if name == "a" else 1, rows=5 if name == "a" else 7), tmp_path / name)
    opened = []
    open_regular = files.open_regular

    def swapping(path: Any, *folder: int) -> Any:
        opened.append(path)
        if len(opened) != 3:
            return open_regular(path, *folder)
        assert files._exchange(tmp_path / "a", tmp_path / "b")
        file = open_regular(path, *folder)
        assert files._exchange(tmp_path / "a", tmp_path / "b")
        return file

    monkeypatch.setattr(files, "open_regular", swapping)
    assert_equal(load_artifact(tmp_path / "a"), small_artifact(0))
    assert len(opened) == 3


KILLER = """
import json, os, random, signal, sys, time
sys.path[:0] = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
from test_artifact import assert_equal, small_artifact
from qdiff_engine.runtime import files
from qdiff_engine.runtime.artifact import load_artifact, save_artifact
artifacts = [small_artifact(0), small_artifact(1, rows=7)]
rng = random.Random(0)
exchange = files._exchange
os.fsync = lambda descriptor: None

def child(work):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)

def save_forever(folder):
    while True:
        for artifact in artifacts:
            save_artifact(artifact, folder)

def killed_at(count, folder):
    # dies like under kill -9, just before the count-th call that changes the disk
    left = [count]
    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir", "close"):
        setattr(os, name, counted(getattr(os, name)))
    files._exchange = counted(files._exchange)
    save_artifact(artifacts[1], folder)

def check(folder):
    loaded = load_artifact(folder)
    assert_equal(loaded, artifacts[loaded.key["seed"]])

def save_again(folder, swaps):
    # what a kill between two of the three steps left aside is for the user to remove
    if os.path.exists(folder) and os.path.exists(folder + ".previous"):
        assert not swaps
        files.shutil.rmtree(folder + ".previous")
    save_artifact(artifacts[0], folder)
    check(folder)
    beside = set(os.listdir(os.path.dirname(folder))) - {"a"}
    assert beside <= (set() if swaps else {"a.previous"}), beside
    for name in beside:
        files.shutil.rmtree(os.path.join(os.path.dirname(folder), name))

def kill(folder, swaps, mode):
    files._exchange = exchange if swaps else lambda a, b: False
    save_artifact(artifacts[0], folder)
    for trial in range(40 if mode == "random" else 100):
        if mode == "random":
            pid = child(lambda: save_forever(folder))
            deadline = time.monotonic() + rng.uniform(0, 0.03)
            try:
                while time.monotonic() < deadline:
                    check(folder)  # a reader beside the writer
            finally:
                os.kill(pid, signal.SIGKILL)
        else:
            pid = child(lambda: killed_at(trial + 1, folder))
        status = os.waitpid(pid, 0)[1]
        check(folder)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, status
            return trial
        save_again(folder, swaps)
    return trial + 1

kills = {}
for swaps in (True, False):
    for mode in ("random", "every call"):
        parent = os.path.join(sys.argv[2], f"{swaps} {mode}")
        os.mkdir(parent)
        kills[f"{swaps} {mode}"] = kill(os.path.join(parent, "a"), swaps, mode)
print(json.dumps(kills))
"""


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How many saves were killed; one process for all, which loads torch once and forks."""
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", KILLER, paths, str(tmp_path_factory.mktemp("kills"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("mode,least", [("random", 40), ("every call", 15)])
def test_killed_while_saving(kills: dict[str, int], exchange: bool, mode: str, least: int) -> None:
    """kill -9 at forty random moments, and before every system call of a save: the old artifact or the new, whole."""
    assert kills[f"{exchange} {mode}"] >= least


def test_previous_is_recovered_and_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_artifact(small_artifact(0), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "a.previous")
    assert_equal(load_artifact(tmp_path / "a"), small_artifact(0))
    for _ in range(2):
        save_artifact(small_artifact(1), tmp_path / "a")
        assert_equal(load_artifact(tmp_path / "a"), small_artifact(1))
        assert_equal(load_artifact(tmp_path / "a.previous"), small_artifact(0))
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    with pytest.raises(FileExistsError, match=r"a\.previous is in the way"):
        save_artifact(small_artifact(2), tmp_path / "a")
    assert_equal(load_artifact(tmp_path / "a"), small_artifact(1))


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder in its place would leave the process in one that is gone; a mount point cannot be renamed."""
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path, "/proc"):
        with pytest.raises(FileExistsError, match="is the working folder or a mount point, which stays"):
            save_artifact(small_artifact(), place)
    save_artifact(small_artifact(), "a")
    assert_equal(load_artifact("a"), small_artifact())


def test_leftovers(tmp_path: Path) -> None:
    """Those of killed saves go with the next one; a living save's, and other files, stay."""
    stale = tmp_path / ".a.saving-0123abcd"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".a.saving-00000000").write_bytes(b"half")
    kept = [".a.saving-notes", ".ab.saving-0123abcd", "a.saving-0123abcd"]
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    with files.replace_folder(tmp_path / "a", frozenset({"x"})) as living:
        save_artifact(small_artifact(), tmp_path / "a")
        assert living.is_dir() and not stale.exists()
        (living / "x").write_text("y")
        with pytest.raises(FileExistsError):
            raise_through(living, tmp_path / "a")
        os.replace(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "a", "b"])
    assert contents(tmp_path / "a") == {"x": b"y"}


def raise_through(temporary: Path, target: Path) -> None:
    """What the end of the save would meet: somebody else's folder in its place."""
    files.check_replaceable(target, frozenset({"x"}))


def test_write_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_file(tmp_path / "state", b"old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            with pytest.raises(OSError, match="No space left"):
                files.write_file(tmp_path / "state", b"new")
        assert os.listdir(tmp_path) == ["state"] and (tmp_path / "state").read_bytes() == b"old"
    (tmp_path / ".state.saving-0123abcd").write_bytes(b"half")
    files.write_file(tmp_path / "state", b"new")
    assert os.listdir(tmp_path) == ["state"]
