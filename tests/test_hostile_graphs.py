"""Graphs with valid digests that no capture would make: `load` refuses them with one line, and in good time."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import networks
import pytest
from test_artifact import contents
from test_artifact_faults import CONFIG, GRAPH, canonical_graph, resealed, write

import qdiff_engine as qe
from qdiff_engine.graph.operators import FLOAT_OPS
from qdiff_engine.graph.rewrite import Rewriter
from qdiff_engine.runtime.artifact import ArtifactError

# of the changes below, how many `load` must refuse at least; the others are found by the first call, or do no harm
KINDS = {
    "int_conv2d": 41,
    "int_gemm": 16,
    "groupnorm_silu_quantize": 25,
    "quantize": 9,
    "linear": 3,
    "scaled_dot_product_attention": 0,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hostile") / "a"
    networks.integer_model("unet2d").save_pretrained(folder)
    return contents(folder)


def changed(good: dict[str, bytes], folder: Path, graph: Any) -> Path:
    return write(folder, resealed({**good, GRAPH: canonical_graph(graph)}))


def test_an_unchanged_graph_loads(good: dict[str, bytes], tmp_path: Path) -> None:
    qe.load(changed(good, tmp_path / "a", json.loads(good[GRAPH])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_without_an_argument_or_with_a_wrong_one(kind: str, good: dict[str, bytes], tmp_path: Path) -> None:
    at = next(i for i, node in enumerate(json.loads(good[GRAPH])["nodes"]) if node["op"] == kind)
    node = json.loads(good[GRAPH])["nodes"][at]
    changes: list[dict[str, Any]] = [{"args": []}, {"args": [1]}, {"args": ["%sample"] * len(node["args"])}]
    for name in node["kwargs"]:
        changes.append({"kwargs": {k: v for k, v in node["kwargs"].items() if k != name}})
        changes += [{"kwargs": {**node["kwargs"], name: value}} for value in ("x", -1, None, [], "%sample")]
    refused = 0
    for change in changes:
        graph = json.loads(good[GRAPH])
        graph["nodes"][at] |= change
        try:
            model = qe.load(changed(good, tmp_path / "a", graph))
        except (ValueError, TypeError) as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1000
            assert "canonical form" not in message
            refused += 1
        else:
            with contextlib.suppress(Exception):  # the process must survive it, no more
                model(networks.normal(1, 3, 16, 16), model.table.timesteps[0])
    print(f"{kind}: {refused} of {len(changes)} refused")
    assert refused >= KINDS[kind]


def test_many_small_nodes_take_no_time_of_their_square(
    good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand attentions with a quantiser each, which the CPU joins, one at a time."""
    graph, config = json.loads(good[GRAPH]), json.loads(good[CONFIG])
    shape = ["B", *config["model_config"]["block_out_channels"][:1], 16, 16]
    first = graph["nodes"][next(i for i, node in enumerate(graph["nodes"]) if node["op"] == "int_conv2d")]
    assert first["shape"] == shape
    site = next(node["kwargs"]["site"] for node in graph["nodes"] if node["op"] == "quantize")
    template: dict[str, Any] = {"shape": shape, "section": "main"}
    for i in range(1000):
        args = [f"%{first['name']}"] * 3
        graph["nodes"].append(
            {"name": f"a{i}", "op": "scaled_dot_product_attention", "args": args, "kwargs": {}, **template}
        )
        kwargs = {"site": site, "activation": "none"}
        graph["nodes"].append({"name": f"q{i}", "op": "quantize", "args": [f"%a{i}"], "kwargs": kwargs, **template})
    folder = changed(good, tmp_path / "a", graph)
    rebuilt: list[int] = []
    refresh = Rewriter.refresh
    monkeypatch.setattr(Rewriter, "refresh", lambda self: rebuilt.append(len(self.graph.nodes)) or refresh(self))
    qe.load(folder)
    assert sum(rebuilt) < 20 * len(graph["nodes"]), "indices are not made anew for every node that is replaced"


def test_too_many_nodes(good: dict[str, bytes], tmp_path: Path) -> None:
    graph = json.loads(good[GRAPH])
    graph["nodes"] += [{"name": f"n{i}"} for i in range(50_000)]
    with pytest.raises(ArtifactError, match=r"graph.json: graph.nodes must be at most 50000, got"):
        qe.load(changed(good, tmp_path / "a", graph))


def test_sizes_keep_to_64_bits() -> None:
    size = 3
    with pytest.raises(ValueError, match="a size of the graph must have at most 64 bits, got mul"):
        for _ in range(59):
            size = FLOAT_OPS["sym_mul"](size, size)
    assert size < 2**63 and FLOAT_OPS["sym_floordiv"](7, 2) == 3
