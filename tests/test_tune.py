"""The tile tuner without a GPU: its candidates, its choice with made-up times, its editing of the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from qdiff_kernels import tiles
from qdiff_kernels.tiles import DESCRIPTOR_TILES, MULTIPROCESSORS, SHARED_MEMORY, TILES, Launch, Tile

from benchmarks import results_file, shapes, tune, tune_kernels

BIG, MIDDLE, SMALL = Tile(128, 256, 128, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)


FASTER = {MIDDLE: 0.25}  # with descriptors


def fake(speed: dict[Tile, float]) -> tune.Timer:
    """Times as waves of programs over 132 multiprocessors, each as long as its tile is slow."""

    def timer(shape: Any, precision: str, options: Sequence[Launch]) -> dict[Launch, float]:
        times = {}
        for tile, splits, descriptors in options:
            if tile in speed:
                programs = -(-shape.m // tile.block_m) * -(-tune.columns(shape) // tile.block_n) * splits
                work = tile.block_m * tile.block_n * shape.k / splits
                rate = speed[tile] * (FASTER.get(tile, 1.0) if descriptors else 1.0)
                times[Launch(tile, splits, descriptors)] = -(-programs // 132) * work * rate * 1e-9
        return times

    return timer


def rows_of(speed: dict[Tile, float]) -> list[dict[str, Any]]:
    return [row for s, c in tune.products() for row in tune.tuned_rows(s, c, "w8a8", 90, 132, fake(speed))]


@pytest.mark.parametrize("arch", TILES)
def test_candidates_fit_their_architecture(arch: int) -> None:
    found = tune.candidates(arch)
    assert len(found) == len(set(found)) >= 8
    for tile in found:
        assert tile.stages * (tile.block_m + tile.block_n) * tile.block_k <= SHARED_MEMORY[arch]
        assert tile.block_m * tile.block_n <= 128 * 32 * tile.warps
    for shape, multiple in tune.products():
        m, n, k = shape.m, tune.columns(shape), shape.k
        options = tune.launches(arch, m, n, k, MULTIPROCESSORS[arch], multiple)
        assert options and len(options) == len(set(options)) < 800
        assert {option.descriptors for option in options} == {False, arch in DESCRIPTOR_TILES}
        for tile, splits, _ in options:
            assert multiple % tile.block_k == 0 and (splits == 1 or k // tile.block_k >= 4 * splits)


def test_rows_follow_the_schema() -> None:
    rows = rows_of({BIG: 1.0, SMALL: 2.0})
    results_file.check({"machine": dict.fromkeys(("gpu", *results_file.MACHINE_KEYS), 1), "rows": rows}, "tune")
    first = [row for row in rows if row["shape"] == rows[0]["shape"]]
    assert [row["median_ms"] for row in first] == sorted(row["median_ms"] for row in first)


def test_the_entry_is_the_best_under_the_tables_own_rule() -> None:
    """A tile twice as quick per value as the others is taken; small products still get a small one."""
    before = dict(TILES)
    rows = rows_of({BIG: 1.0, MIDDLE: 2.0, SMALL: 2.2})
    chosen, total, best = tune.entry(rows, 90)
    assert before == TILES, "the search leaves the table as it was"
    assert BIG in chosen and len(chosen) >= 2
    sizes = [tile.block_m * tile.block_n for tile in chosen]
    assert sizes == sorted(sizes, reverse=True)
    assert best <= total < tune._total(tune._by_shape(rows, 90, False), 90, (SMALL,), False)
    with pytest.raises(ValueError, match="architecture 80"):
        tune.entry(rows, 80)


def test_each_table_has_its_own_entry(capsys: pytest.CaptureFixture[str]) -> None:
    """What descriptors make quick says nothing about pointers, and the other way round."""
    before = dict(tiles.DESCRIPTOR_TILES)
    rows = rows_of({BIG: 1.0, MIDDLE: 2.0, SMALL: 2.2})
    pointers, described = (tune.entry(rows, 90, descriptors) for descriptors in (False, True))
    assert described[0][0] == MIDDLE and pointers[0][0] == BIG and described[1] < pointers[1]
    assert before == tiles.DESCRIPTOR_TILES, "the search leaves the table as it was"
    assert tune.report(rows, 90) == {"TILES": pointers[0], "DESCRIPTOR_TILES": described[0]}
    assert "DESCRIPTOR_TILES\n    90: (Tile(" in capsys.readouterr().out
    with pytest.raises(ValueError, match="architecture 90 and of DESCRIPTOR_TILES"):
        tune.entry([row for row in rows if not row["descriptors"]], 90, True)


def test_a_tile_that_is_slow_everywhere_is_not_taken() -> None:
    chosen, _, _ = tune.entry(rows_of({MIDDLE: 1.0, SMALL: 1.0, BIG: 50.0}), 90)
    assert BIG not in chosen and set(chosen) <= {MIDDLE, SMALL}


def test_the_table_is_rewritten_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tune.TABLE.read_text()
    changed = tune.rewritten(source, 90, (BIG, SMALL))
    spaces: dict[str, Any] = {"__name__": "tiles_again"}
    exec(compile(changed, "tiles.py", "exec"), spaces)
    assert [tuple(t) for t in spaces["TILES"][90]] == [tuple(BIG), tuple(SMALL)]
    assert spaces["DESCRIPTOR_TILES"].keys() == DESCRIPTOR_TILES.keys()
    exec(compile(tune.rewritten(source, 90, (SMALL,), "DESCRIPTOR_TILES"), "tiles.py", "exec"), again := dict(spaces))
    assert [tuple(t) for t in again["DESCRIPTOR_TILES"][90]] == [tuple(SMALL)]
    assert [tuple(t) for t in again["TILES"][90]] == [tuple(t) for t in TILES[90]]
    same = {arch: [tuple(t) for t in entry] for arch, entry in spaces["TILES"].items() if arch != 90}
    assert same == {arch: [tuple(t) for t in entry] for arch, entry in TILES.items() if arch != 90}
    untouched = [line for line in source.splitlines() if line in changed.splitlines()]
    assert len(source.splitlines()) - len(untouched) <= 3
    with pytest.raises(ValueError, match="no architecture 70"):
        tune.rewritten(source, 70, (BIG,))
    with pytest.raises(ValueError, match="no literal table"):
        tune.rewritten("TILES = make()\n", 90, (BIG,))

    table, results = tmp_path / "tiles.py", tmp_path / "x-tune.json"
    table.write_text(source)
    machine = dict.fromkeys(("gpu", *results_file.MACHINE_KEYS), "x")
    results.write_text(json.dumps({"machine": machine, "rows": rows_of({BIG: 1.0, SMALL: 2.0})}))
    assert tune.main(["--emit", str(results), "--write", "--table", str(table)]) == 0
    assert "90: (Tile(" in capsys.readouterr().out and table.read_text() != source
    assert tiles.TILES[90] == TILES[90]
    written: dict[str, Any] = {"__name__": "tiles_written"}
    exec(compile(table.read_text(), "tiles.py", "exec"), written)
    assert [written[name][90] != getattr(tiles, name)[90] for name in tune.TABLES.values()] == [True, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tuner itself compares launches")
@pytest.mark.parametrize(
    "shape, descriptors",
    [
        (shapes.Gemm("t", 1, 40, 33, 130), False),
        (shapes.Gemm("t", 1, 40, 33, 128), True),
        (shapes.Conv("t", 1, 1, 64, 8, 5), False),
        (shapes.Conv("t", 1, 1, 64, 24, 5), True),
    ],
)
def test_launches_are_compared_before_they_are_timed(
    shape: shapes.Gemm | shapes.Conv, descriptors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_kernels, "set_count", lambda *_: 2)
    monkeypatch.setattr(tune_kernels, "times", lambda contestants, *_: ({"it": {"median": 1.0}}, {}))
    options = [Launch(Tile(32, 32, 64, 4, 1), 1, descriptors), Launch(Tile(16, 32, 64, 4, 1), 2, descriptors)]
    assert tune_kernels.times_of(shape, "w4a8", options, torch.device("cpu"), 1) == dict.fromkeys(options, 1.0)
    real = tune_kernels.runner

    def wrong(*arguments: Any) -> tune_kernels.Runner:
        run = real(*arguments)
        return lambda i, launch: run(i, launch) + (launch is not None)

    monkeypatch.setattr(tune_kernels, "runner", wrong)
    with pytest.raises(ValueError, match="another result"):
        tune_kernels.times_of(shape, "w4a8", options, torch.device("cpu"), 1)
