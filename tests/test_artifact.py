"""An artifact comes back bit for bit, in the same bytes each time, and replaces only artifacts."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from qdiff_engine.graph.ir import Const, Graph, Node, Ref
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime import files
from qdiff_engine.runtime.artifact import FILES, Artifact, ArtifactError, load_artifact, save_artifact
from qdiff_engine.tables import Table
from qdiff_engine.weights import QuantizedWeight


def random_weight(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> QuantizedWeight:
    """Random integers over the whole range of ``bits``, both ends included."""
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    values = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight(values, torch.rand(shape[0], generator=generator) + 0.01, bits)


def random_table(sites: tuple[str, ...], rows: int, generator: torch.Generator) -> Table:
    """Descending timesteps, modes and bits of every kind, corrections that are not the identity."""
    bits = torch.tensor([4, 8, 16], dtype=torch.uint8)[torch.randint(0, 3, (rows, len(sites)), generator=generator)]
    return Table(
        timesteps=tuple(float(980 - 20 * i) for i in range(rows)),
        modes=tuple(("A4", "A8", "A16")[i % 3] for i in range(rows)),
        sites=sites,
        scale=torch.rand(rows, len(sites), generator=generator) + 1e-3,
        zero_point=torch.randint(-8, 8, (rows, len(sites)), generator=generator, dtype=torch.int32),
        bits=bits,
        output_scale=torch.rand(rows, 3, generator=generator) + 0.5,
        output_shift=torch.randn(rows, 3, generator=generator),
    )


def small_graph() -> Graph:
    """Two K segments, an odd K, a layer read by two nodes, every kind of argument."""
    conv = {"layer": "up.0.conv", "segments": (5, 4), "stride": (1, 1), "padding": (1, 1, 1, 1), "temb": None}
    nodes = [
        Node("freqs", "mul", (Ref("timestep"), Const("freqs")), {}, ("B", 8), "time"),
        Node("mask", "where", (Const("mask"), float("-inf"), 0.1), {"dtype": torch.float32}, (7, 7), "prompt"),
        Node("q0", "quantize", (Ref("sample"),), {"site": "up.0.conv.0", "activation": "none"}, ("B", 5, 8, 8)),
        Node("q1", "quantize", (Ref("sample"),), {"site": "up.0.conv.1", "activation": "silu"}, ("B", 4, 8, 8)),
        Node("conv", "int_conv2d", (Ref("q0"), Ref("q1")), {**conv, "bias": Const("up.0.conv.bias")}, ("B", 3, 8, 8)),
        Node("q2", "quantize", (Ref("conv"),), {"site": "out", "activation": "none"}, ("64B", 7)),
        Node("one", "int_gemm", (Ref("q2"),), {"layer": "out", "residual": None}, ("64B", 6)),
        Node("two", "int_gemm", (Ref("q2"),), {"layer": "out", "residual": Ref("one")}, ("64B", 6)),
        Node("eps", "reshape", (Ref("two"), (-1, 3, 8, 8)), {}, ("B", 3, 8, 8)),
    ]
    return Graph({"sample": ("B", 9, 8, 8), "timestep": (1,), "context": ("B", 7, 16)}, nodes, "eps")


def small_artifact(seed: int = 0, rows: int = 5) -> Artifact:
    """A small artifact with a tensor of every kind that the format knows."""
    g = torch.Generator().manual_seed(seed)
    weights = {
        "up.0.conv": (random_weight((3, 5, 3, 3), 8, g), random_weight((3, 4, 3, 3), 4, g)),
        "out": (random_weight((6, 7), 4, g),),
    }
    constants: dict[str, Tensor] = {
        "freqs": torch.randn(8, generator=g, dtype=torch.float64),
        "mask": torch.rand(7, 7, generator=g) > 0.5,
        "up.0.conv.bias": torch.randn(3, generator=g),
    }
    sites = ("up.0.conv.0", "up.0.conv.1", "out")
    key = {"model_hash": "ab" * 32, "steps": rows, "eta": 0.0, "guidance": None, "seed": seed, "ü": [1, 2.5, True]}
    config = {"_class_name": "UNet2DModel", "sample_size": 8, "down": ["a", "b"]}
    return Artifact(small_graph(), weights, constants, random_table(sites, rows, g), Recipe.named("w4a8"), key, config)


def assert_equal(a: Artifact, b: Artifact) -> None:
    """Every field is the same, tensors bit for bit."""
    assert str(a.graph) == str(b.graph)
    assert (a.recipe, a.key, a.model_config, a.engine_version) == (b.recipe, b.key, b.model_config, b.engine_version)
    assert list(a.table.timesteps) == list(b.table.timesteps)
    assert (a.table.modes, a.table.sites) == (b.table.modes, b.table.sites)
    assert a.weights.keys() == b.weights.keys() and a.constants.keys() == b.constants.keys()
    pairs = [(getattr(a.table, n), getattr(b.table, n)) for n in ("scale", "zero_point", "bits")]
    pairs += [(a.table.output_scale, b.table.output_scale), (a.table.output_shift, b.table.output_shift)]
    pairs += [(a.constants[key], b.constants[key]) for key in a.constants]
    for layer, parts in a.weights.items():
        for mine, theirs in zip(parts, b.weights[layer], strict=True):
            assert mine.bits == theirs.bits
            pairs += [(mine.values, theirs.values), (mine.scale, theirs.scale)]
    for x, y in pairs:
        assert x.dtype == y.dtype and torch.equal(x, y)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    artifact = small_artifact()
    save_artifact(artifact, tmp_path / "a")
    assert set(os.listdir(tmp_path / "a")) == FILES
    assert_equal(artifact, load_artifact(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_same_bytes_every_time(tmp_path: Path) -> None:
    artifact = small_artifact()
    save_artifact(artifact, tmp_path / "a")
    shuffled = dataclasses.replace(
        small_artifact(),
        weights=dict(reversed(artifact.weights.items())),
        constants=dict(reversed(artifact.constants.items())),
        key=dict(reversed(artifact.key.items())),
    )
    save_artifact(shuffled, tmp_path / "b")
    save_artifact(load_artifact(tmp_path / "a"), tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    artifact = small_artifact()
    save_artifact(artifact, tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(tensors["weight.up.0.conv.q1"], artifact.weights["up.0.conv"][1].stored())
    assert torch.equal(tensors["constant.freqs"], artifact.constants["freqs"])
    graph = (tmp_path / "a" / "graph.json").read_text()
    assert [node["name"] for node in json.loads(graph)["nodes"]] == [node.name for node in artifact.graph.nodes]
    assert sum('"op"' in line for line in graph.splitlines()) == len(artifact.graph.nodes)
    text = "".join((tmp_path / "a" / name).read_text() for name in ("config.json", "graph.json"))
    assert str(tmp_path) not in text and os.uname().nodename not in text


@pytest.mark.parametrize("rows,sites", [(1, False), (200, True)])
def test_extreme_tables(tmp_path: Path, rows: int, sites: bool) -> None:
    artifact = small_artifact(rows=rows)
    if not sites:
        graph = Graph({"sample": ("B", 3, 8, 8), "timestep": (1,)}, [], "sample")
        table = random_table((), rows, torch.Generator().manual_seed(1))
        artifact = dataclasses.replace(artifact, graph=graph, table=table, weights={}, constants={})
    save_artifact(artifact, tmp_path / "a")
    assert_equal(artifact, load_artifact(tmp_path / "a"))


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3)])
def test_constants_of_every_kind(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape).mul(9).to(getattr(torch, dtype))
    strided = torch.stack([value, value], -1)[..., 0]
    artifact = dataclasses.replace(small_artifact(), constants={**small_artifact().constants, "freqs": strided})
    save_artifact(artifact, tmp_path / "a")
    assert_equal(artifact, load_artifact(tmp_path / "a"))


def test_layer_names_do_not_collide(tmp_path: Path) -> None:
    """Layers called "table" and "constant" beside constants called "q0" and "scale"."""
    g = torch.Generator().manual_seed(0)
    names = ("table", "constant", "weight.table", "table.q0")
    nodes = [Node(f"n{i}", "int_gemm", (Ref("sample"),), {"layer": name}, ("B", 2)) for i, name in enumerate(names)]
    nodes.append(Node("sum", "add", (Const("q0"), Const("scale")), {}, (3,)))
    artifact = dataclasses.replace(
        small_artifact(),
        graph=Graph({"sample": ("B", 2), "timestep": (1,)}, nodes, "n0"),
        weights={name: (random_weight((2, 2), 4, g),) for name in names},
        constants={"q0": torch.randn(3), "scale": torch.randn(3)},
        table=random_table((), 4, g),
    )
    save_artifact(artifact, tmp_path / "a")
    assert_equal(artifact, load_artifact(tmp_path / "a"))


@pytest.mark.parametrize("exchange", [True, False])
def test_saving_over_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (tmp_path / "a").mkdir()
    for seed in range(3):
        save_artifact(small_artifact(seed), tmp_path / "a")
        assert os.listdir(tmp_path) == ["a"]
        assert_equal(load_artifact(tmp_path / "a"), small_artifact(seed))


def test_a_loaded_model_does_not_change_with_its_files(tmp_path: Path) -> None:
    save_artifact(small_artifact(0), tmp_path / "a")
    loaded = load_artifact(tmp_path / "a")
    model = tmp_path / "a" / "model.safetensors"
    with open(model, "r+b") as file:
        file.write(b"\0" * model.stat().st_size)
    assert_equal(loaded, small_artifact(0))


def test_links(tmp_path: Path) -> None:
    """A link to the folder stays a link when it is saved over; links inside are read."""
    save_artifact(small_artifact(0), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save_artifact(small_artifact(1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_equal(load_artifact(tmp_path / "real"), small_artifact(1))
    (tmp_path / "cache").mkdir()
    for name in FILES:
        (tmp_path / "cache" / name).symlink_to(f"../real/{name}")
    assert_equal(load_artifact(tmp_path / "cache"), small_artifact(1))


@pytest.mark.parametrize("content", ["file", "stranger", "extra", "incomplete", "folders"])
def test_nothing_else_is_replaced(tmp_path: Path, content: str) -> None:
    target = tmp_path / "a"
    if content == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if content == "stranger":
        (target / "thesis.tex").write_text("mine")
    if content in ("extra", "incomplete"):
        save_artifact(small_artifact(), target)
    if content == "extra":
        (target / "notes.txt").write_text("mine")
        assert_equal(load_artifact(target), small_artifact())  # never read, so harmless
    if content == "incomplete":
        (target / "graph.json").unlink()
    if content == "folders":
        for name in FILES:
            (target / name).mkdir()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="a file, not a folder" if content == "file" else "neither empty nor"):
        save_artifact(small_artifact(1), target)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def _broken() -> dict[str, tuple[dict[str, Any], str]]:
    a = small_artifact()
    nodes = a.graph.nodes
    graph = lambda nodes: {"graph": Graph(a.graph.inputs, nodes, nodes[-1].name)}  # noqa: E731
    swap = lambda i, **changes: graph(nodes[:i] + [dataclasses.replace(nodes[i], **changes)] + nodes[i + 1 :])  # noqa: E731
    return {
        "layer without weights": ({"weights": {"out": a.weights["out"]}}, "up.0.conv"),
        "weights without a layer": ({"weights": {**a.weights, "ghost": a.weights["out"]}}, "ghost"),
        "missing constant": ({"constants": {k: v for k, v in a.constants.items() if k != "freqs"}}, "freqs"),
        "unread constant": ({"constants": {**a.constants, "spare": torch.ones(1)}}, "spare"),
        "NaN constant": ({"constants": {**a.constants, "freqs": torch.tensor([1.0, float("nan")])}}, "constant.freqs"),
        "complex constant": ({"constants": {**a.constants, "freqs": torch.ones(2) * 1j}}, "freqs"),
        "unknown operator": (swap(0, op="system"), "system"),
        "site without a row": (swap(2, kwargs={"site": "elsewhere"}), "elsewhere"),
        "segments of other sizes": (swap(4, kwargs={**nodes[4].kwargs, "segments": (4, 5)}), "segments"),
        "segments missing": (swap(4, kwargs={**nodes[4].kwargs, "segments": None}), "one segment"),
        "layer of another type": (swap(6, kwargs={"layer": (1,)}), "layer"),
        "NaN argument": (swap(8, args=(Ref("two"), float("nan"))), "nan"),
        "node name": (swap(8, name="a b"), "a b"),
        "key with NaN": ({"key": {"eta": float("nan")}}, "eta"),
        "key with a tensor": ({"key": {"eta": torch.ones(1)}}, "eta"),
        "key with integer keys": ({"key": {1: 2}}, "key"),
        "config of another type": ({"model_config": [1]}, "model_config"),
        "layer name": ({"weights": {**a.weights, "a/b": a.weights["out"]}}, "a/b"),
    }


@pytest.mark.parametrize("case", _broken())
def test_what_would_not_load_is_not_saved(tmp_path: Path, case: str) -> None:
    changes, message = _broken()[case]
    save_artifact(small_artifact(), tmp_path / "a")
    with pytest.raises((ValueError, TypeError), match=message):
        save_artifact(dataclasses.replace(small_artifact(), **changes), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert_equal(load_artifact(tmp_path / "a"), small_artifact())


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_artifact(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises((OSError, ValueError), match="file"):
        load_artifact(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="config.json"):
        load_artifact(tmp_path / "empty")


def test_write_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    for _ in range(3):
        data = random.randbytes(random.randrange(10_000))
        files.write_file(path, data)
        assert path.read_bytes() == data and os.listdir(tmp_path) == ["state.bin"]
    (tmp_path / "link").symlink_to("state.bin")
    files.write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == b"new"
