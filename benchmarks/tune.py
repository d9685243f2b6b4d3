"""Which tile is fastest for which product on this GPU, and the entries of the kernels' tile tables that follow.

python -m benchmarks.tune --device cuda                              timings, to benchmarks/results/h200-tune.json
python -m benchmarks.tune --emit benchmarks/results/h200-tune.json   print the entries; --write puts them in tiles.py

`TILES` is for operands that threads read through pointers, `DESCRIPTOR_TILES` for those that the tensor memory
accelerator copies (sm_90 and later): each launch is timed in both ways where the GPU has them. The few tiles of
`INTEGER_TILES` are not searched for.
"""

from __future__ import annotations

import ast
import gc
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from qdiff_kernels import tiles
from qdiff_kernels.tiles import SHARED_MEMORY, Launch, Tile

from benchmarks import results_file, sections, shapes
from benchmarks.sections import Rows, Section
from benchmarks.shapes import Conv, Gemm

TABLE = Path(tiles.__file__)
PRECISIONS = ("w8a8", "w4a8")
Timer = Callable[[Any, str, Sequence[Launch]], dict[Launch, float]]  # milliseconds; a launch that cannot run is absent
Measured = dict[tuple, tuple[dict[str, Any], dict[Launch, float]]]  # shape -> (one of its rows, times by launch)
_SPLITS = (1, 2, 4, 8, 16)
_LARGEST_ENTRY = 4  # tiles per architecture
_FEWEST_VALUES, _MOST_VALUES = 32, 128  # accumulators per thread: with fewer it idles, with more it spills
TABLES = {False: "TILES", True: "DESCRIPTOR_TILES"}  # whether descriptors read the operands -> the table's name


def candidates(arch: int) -> list[Tile]:
    """Tiles that an architecture could run: they fit its shared memory, and a thread's share its registers."""
    made = []
    for m, n, k, warps, stages in itertools.product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4)):
        values = m * n // (32 * warps)
        if not _FEWEST_VALUES <= values <= _MOST_VALUES:
            continue
        if stages * (m + n) * k <= SHARED_MEMORY[arch]:
            made.append(Tile(m, n, k, warps, stages))
    return made


def launches(arch: int, m: int, n: int, k: int, multiprocessors: int, k_multiple: int = 0) -> list[Launch]:
    """Every candidate in one part; and in several where it leaves half of the multiprocessors idle; in both ways."""
    made, ways = [], (False, True) if arch in tiles.DESCRIPTOR_TILES else (False,)
    for tile in candidates(arch):
        if k_multiple % tile.block_k or tile.block_n > max(64, 2 * n):
            continue
        programs = -(-m // tile.block_m) * -(-n // tile.block_n)
        for splits in _SPLITS:
            if splits == 1 or (2 * splits * programs <= 4 * multiprocessors and k // tile.block_k >= 4 * splits):
                made += [Launch(tile, splits, descriptors) for descriptors in ways]
    return made


def products() -> list[tuple[Gemm | Conv, int]]:
    """(shape, channels that block_k must divide), distinct products of real UNets."""
    plain = [gemm for gemm in shapes.GEMMS if not gemm.geglu]
    return [(gemm, 0) for gemm in plain] + [(conv, conv.cin) for conv in shapes.CONVS]


def label(shape: Gemm | Conv) -> str:
    """A shape in words."""
    if isinstance(shape, Gemm):
        return f"int_gemm M{shape.m} N{shape.n} K{shape.k}"
    return f"int_conv2d_3x3 N{shape.batch} C{shape.cin} K{shape.cout} {shape.size}x{shape.size}"


def columns(shape: Gemm | Conv) -> int:
    """N of the product."""
    return shape.n if isinstance(shape, Gemm) else shape.cout


def tuned_rows(
    shape: Gemm | Conv, k_multiple: int, precision: str, arch: int, multiprocessors: int, timer: Timer
) -> Rows:
    """One row per launch that ran, fastest first."""
    m, n, k = shape.m, columns(shape), shape.k
    times = timer(shape, precision, launches(arch, m, n, k, multiprocessors, k_multiple))
    name, _, text = label(shape).partition(" ")
    common = {
        "name": name, "shape": text, "precision": precision, "arch": arch, "m": m, "n": n, "k": k,
        "k_multiple": k_multiple, "count": shape.count, "multiprocessors": multiprocessors,
    }  # fmt: skip
    ordered = sorted(times.items(), key=lambda item: item[1])
    return [
        {**common, "tile": list(tile), "splits": splits, "descriptors": descriptors, "median_ms": ms}
        for (tile, splits, descriptors), ms in ordered
    ]


def entry(
    rows: Sequence[dict[str, Any]], arch: int, descriptors: bool = False
) -> tuple[tuple[Tile, ...], float, float]:
    """(tiles of the table, their total time, that of the best launch of every shape), weighted by the shapes' counts.

    `tiles.choose` takes the first tile that keeps the GPU busy, so tiles stand in falling order of size. Added is, one
    after another, the tile that lowers the total most under that very rule, until none does.

    Args:
        descriptors: the entry of `DESCRIPTOR_TILES`, not that of `TILES`; each from its own launches.
    """
    measured = _by_shape(rows, arch, descriptors)
    if not measured:
        raise ValueError(f"no row is of architecture {arch} and of {TABLES[descriptors]}")
    usable = sorted({launch.tile for _, times in measured.values() for launch in times}, key=_size, reverse=True)
    best = sum(row["count"] * min(times.values()) for row, times in measured.values())
    chosen: tuple[Tile, ...] = ()
    total = float("inf")
    while len(chosen) < _LARGEST_ENTRY:
        tried = [tuple(sorted({*chosen, tile}, key=_size, reverse=True)) for tile in usable if tile not in chosen]
        costs = ((_total(measured, arch, option, descriptors), option) for option in tried)
        cost, better = min(costs, default=(total, chosen))
        if cost >= total:
            break
        total, chosen = cost, better
    return chosen, total, best


def _size(tile: Tile) -> tuple[int, ...]:
    return (tile.block_m * tile.block_n, *tile)


def _by_shape(rows: Sequence[dict[str, Any]], arch: int, descriptors: bool) -> Measured:
    found: Measured = {}
    for row in rows:
        if row["arch"] == arch and row["descriptors"] == descriptors:
            key = (row["name"], row["shape"], row["precision"])
            launch = Launch(Tile(*row["tile"]), row["splits"], descriptors)
            found.setdefault(key, (row, {}))[1][launch] = row["median_ms"]
    return found


def _total(measured: Measured, arch: int, option: tuple[Tile, ...], descriptors: bool) -> float:
    """Time of all shapes when the table's entry is ``option``; a launch that was not timed costs the slowest one."""
    if all(tile.block_n > 64 for tile in option):  # narrow outputs need a tile, too
        return float("inf")
    table = getattr(tiles, TABLES[descriptors])
    before, alignment = table[arch], tiles.DESCRIPTOR_ALIGNMENT if descriptors else 0
    table[arch] = option
    try:
        total = 0.0
        for row, times in measured.values():
            size = (row["m"], row["n"], row["k"], row["multiprocessors"])
            launch = tiles.choose(arch, *size, k_multiple=row["k_multiple"], alignment=alignment)
            total += row["count"] * times.get(launch, 1.5 * max(times.values()))
        return total
    finally:
        table[arch] = before


def literal(entry_: Sequence[Tile]) -> str:
    """The entry as source."""
    return "(" + ", ".join(f"Tile({', '.join(map(str, tile))})" for tile in entry_) + ",)"


def rewritten(source: str, arch: int, entry_: Sequence[Tile], table: str = "TILES") -> str:
    """``source`` with the value of a table's entry for ``arch`` replaced, everything else as it was.

    Raises:
        ValueError: the source has no such table, or the table no such architecture.
    """
    for node in ast.walk(ast.parse(source)):
        targets = getattr(node, "targets", [getattr(node, "target", None)])  # TILES = ..., TILES: type = ...
        named = any(isinstance(target, ast.Name) and target.id == table for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == arch:
                    return _replaced(source, value, literal(entry_))
            raise ValueError(f"{table} has no architecture {arch}; add an entry for it first")
    raise ValueError(f"no literal table {table} was found")


def _replaced(source: str, node: ast.expr, text: str) -> str:
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None and node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return source[:start] + text + source[end:]


def gpu_timer(device: torch.device, rounds: int, jobs: int) -> Timer:
    """Times launches of the real kernels, after they compiled in ``jobs`` processes and gave the default's result."""
    from benchmarks import tune_kernels

    compiled: set[tuple[bool, str, Launch]] = set()

    def timer(shape: Any, precision: str, options: Sequence[Launch]) -> dict[Launch, float]:
        new = {(isinstance(shape, Conv), precision, launch) for launch in options} - compiled
        if new and jobs > 1:
            work = [(shape, precision, launch) for _, _, launch in sorted(new, key=str)]
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                list(pool.map(tune_kernels.compile_one, work))
        compiled.update(new)
        return tune_kernels.times_of(shape, precision, options, device, rounds)

    return timer


def measure(options: Namespace) -> int:
    """The timings; 1 where a section went wrong."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no NVIDIA GPU here")
    start, device = sections.time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    arch, units = tiles.architecture((properties.major, properties.minor)), properties.multi_processor_count
    machine = results_file.machine("cuda", options.commit)
    timer = gpu_timer(device, 3 if options.quick else options.repetitions, options.jobs)
    todo = [
        Section(f"{label(shape)} {p}", lambda s=shape, c=multiple, p=p: tuned_rows(s, c, p, arch, units, timer), 60.0)
        for p in PRECISIONS
        for shape, multiple in products()
    ]
    path = options.out or (None if options.quick else results_file.default_path("tune", "cuda"))
    gc.freeze()  # every capture of a graph collects garbage, which takes longer than timing it
    with torch.no_grad():
        rows, wrong = sections.run(todo[:1] if options.quick else todo, options, "tune", machine, path, start=start)
    if rows:
        report(rows, arch)
    for line in wrong:
        print(f"went wrong: {line}")
    return 1 if wrong else 0


def report(rows: Rows, arch: int) -> dict[str, tuple[Tile, ...]]:
    """Print the entry of every table that was timed, and how it does; the entries by the table's name."""
    entries = {}
    for descriptors in sorted({row["descriptors"] for row in rows if row["arch"] == arch}):
        chosen, total, best = entry(rows, arch, descriptors)
        print(f"{TABLES[descriptors]}\n    {arch}: {literal(chosen)},")
        print(f"# {total:.3f} ms for all layers; {best:.3f} ms if every shape had its own best launch")
        entries[TABLES[descriptors]] = chosen
    return entries


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = results_file.arguments(__doc__, "<gpu>-tune.json")
    results_file.device_arguments(parser, default="cuda")
    parser.add_argument("--repetitions", type=int, default=10, help="timed rounds")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile kernels")
    parser.add_argument("--emit", type=Path, default=None, help="time nothing: print the entries that a file leads to")
    parser.add_argument("--write", action="store_true", help="with --emit: put them in kernels/qdiff_kernels/tiles.py")
    parser.add_argument("--table", type=Path, default=TABLE, help="with --write: the file to change")
    options = parser.parse_args(arguments)
    if options.emit is None:
        return measure(options)
    document = json.loads(options.emit.read_text(encoding="utf-8"))
    results_file.check(document, "tune")
    for arch in sorted({row["arch"] for row in document["rows"]}):
        entries = report(document["rows"], arch)
        if options.write:
            source = options.table.read_text(encoding="utf-8")
            for table, chosen in entries.items():
                source = rewritten(source, arch, chosen, table)
            options.table.write_text(source, encoding="utf-8")
            print(f"wrote {options.table}; ruff format puts it in shape, tests/compile looks for spilled registers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
