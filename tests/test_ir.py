"""The graph: reading, rewriting, printing, and JSON from strangers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_engine.graph.ir import DTYPES, Const, Graph, Node, Ref, from_json, map_leaves, sizes, to_json

OPERATORS = frozenset({"add", "mul", "cat"})


def make_graph() -> Graph:
    nodes = [
        Node("t", "mul", (Ref("timestep"), 2.0), {}, ("B", 4), "time"),
        Node("a", "add", (Ref("sample"), Const("w")), {"alpha": 1, "dtype": torch.float32}, ("B", 3)),
        Node("unused", "mul", (Ref("a"), float("-inf")), {}, ("B", 3)),
        Node("b", "cat", ((Ref("a"), Ref("t"), Ref("a")), -1), {}, ("2B", 10)),
    ]
    return Graph({"sample": ("B", 3), "timestep": (1,)}, nodes, "b")


def test_readers_and_pruning() -> None:
    graph = make_graph()
    assert list(graph.node("b").refs()) == ["a", "t", "a"] and list(graph.node("a").consts()) == ["w"]
    assert [n.name for n in graph.users()["a"]] == ["unused", "b"] and graph.users()["b"] == []
    graph.prune()
    assert [n.name for n in graph.nodes] == ["t", "a", "b"]
    with pytest.raises(KeyError, match="unused"):
        graph.node("unused")


def test_rename_reaches_nested_references() -> None:
    node = make_graph().node("b")
    node.rename({"a": "x", "t": "y"})
    assert node.args == ((Ref("x"), Ref("y"), Ref("x")), -1)


def test_text() -> None:
    assert str(make_graph()).splitlines() == [
        "graph(%sample: ['B', 3], %timestep: [1]) -> %b",
        "  # time",
        "  %t: ['B', 4] = mul(%timestep, 2.0)",
        "  # main",
        "  %a: ['B', 3] = add(%sample, $w, alpha=1, dtype=torch.float32)",
        "  %unused: ['B', 3] = mul(%a, -inf)",
        "  %b: ['2B', 10] = cat([%a, %t, %a], -1)",
    ]


def test_sizes() -> None:
    assert sizes((3, "B", "8B", "0B"), 5) == (3, 5, 40, 0)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.sampled_from([*DTYPES.values(), Ref("sample"), Ref("timestep"), Const("a.b-c_0")]),
    st.text(max_size=5).filter(lambda s: not s.startswith(("%", "$"))),
)
arguments = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, tuple) else 0


@settings(deadline=None)
@given(st.lists(arguments.filter(lambda v: _depth(v) <= 4), max_size=4), arguments.filter(lambda v: _depth(v) <= 4))
def test_json_round_trip(args: list[Any], keyword: Any) -> None:
    """Every argument comes back equal and of the same type, through real JSON text."""
    node = Node("n.0-a_B", "add", tuple(args), {"k": keyword}, (0, "B", "12B"), "prompt")
    graph = Graph({"sample": ("B",), "timestep": (1,)}, [node], "n.0-a_B")
    again = from_json(json.loads(json.dumps(to_json(graph), allow_nan=False)), OPERATORS)
    assert to_json(again) == to_json(graph) and repr(again) == repr(graph)


@pytest.mark.parametrize("value", [object(), float("nan"), torch.bfloat16, "%a", "$a", 1j, {"a": 1}, torch.ones(1)])
def test_arguments_that_cannot_be_stored(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be serialised"):
        to_json(Graph({}, [Node("a", "add", (value,))], "a"))


BAD_ARGUMENTS: list[Any] = [
    {"dtype": "float8"}, {"dtype": []}, {"dtype": {}}, {"float": "nan"}, {"float": []}, {"a": 1}, {}, "%", "% ", "%a/b",
    "$", "$a b", "%" + "a" * 201, [[[[[1]]]]], 2**63, -(2**63) - 1,
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_ARGUMENTS)
def test_bad_arguments(value: Any) -> None:
    for change in ({"args": [value]}, {"kwargs": {"k": value}}):
        data = to_json(make_graph())
        data["nodes"][1].update(change)
        with pytest.raises(ValueError, match="node 'a'"):
            from_json(data, OPERATORS)


@pytest.mark.parametrize("size", [-1, 2**31, True, 1.0, None, "", "b", "-1B", "1.0B", "٣B", "BB", "9" * 10 + "B", "%a"])
def test_bad_sizes(size: Any) -> None:
    data = to_json(make_graph())
    data["nodes"][1]["shape"] = [size]
    with pytest.raises(ValueError, match="node 'a'.shape"):
        from_json(data, OPERATORS)
    data = to_json(make_graph())
    data["inputs"]["sample"] = [size]
    with pytest.raises(ValueError, match="inputs.sample"):
        from_json(data, OPERATORS)


KINDS = {"name": str, "op": str, "args": list, "kwargs": dict, "shape": list, "section": str}
WRONG = [(f, v) for f, kind in KINDS.items() for v in (None, 1, True, 1.5, "other", [], {}) if type(v) is not kind]


@pytest.mark.parametrize("field,value", [*WRONG, *((field, "missing") for field in KINDS)])
def test_fields_of_the_wrong_kind(field: str, value: Any) -> None:
    data = to_json(make_graph())
    data["nodes"][1][field] = value
    if value == "missing":
        del data["nodes"][1][field]
    with pytest.raises(ValueError, match=r"nodes\[1\]|node "):
        from_json(data, OPERATORS)


@pytest.mark.parametrize("data", [None, [], 1, "x", {}, {"inputs": {}}, {"inputs": [], "nodes": [], "output": "a"}])
def test_not_a_graph(data: Any) -> None:
    with pytest.raises(ValueError, match="graph"):
        from_json(data, OPERATORS)


CONTRADICTIONS = {
    "operator": (lambda d: d["nodes"][1].update(op="eval"), "operator 'eval' is not in the list"),
    "later value": (lambda d: d["nodes"].reverse(), "no earlier node defines"),
    "itself": (lambda d: d["nodes"][1].update(args=["%a"]), "no earlier node defines"),
    "twice": (lambda d: d["nodes"].append(copy.deepcopy(d["nodes"][0])), "defined twice"),
    "like an input": (lambda d: d["nodes"][2].update(name="sample"), "defined twice"),
    "output": (lambda d: d.update(output="nowhere"), "output %nowhere is not defined"),
    "section": (lambda d: d["nodes"][1].update(section="night"), "section 'night'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case: str) -> None:
    change, message = CONTRADICTIONS[case]
    data = to_json(make_graph())
    change(data)
    with pytest.raises(ValueError, match=message):
        from_json(data, OPERATORS)


def test_map_leaves_keeps_the_containers() -> None:
    assert map_leaves(([1, (2,)], {"a": [3]}), lambda v: v + 1) == ([2, (3,)], {"a": [4]})
