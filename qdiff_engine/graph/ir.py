"""The integer graph: a list of named nodes in execution order, readable, serialisable, free of code.

A node's arguments are JSON literals, `Ref` (the value of another node or of a graph input, written ``%name``) and
`Const` (a tensor of the parameter store, written ``$key``). Batch-dependent sizes are strings: ``"B"``, ``"8B"``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Dim = int | str  # an integer, or "kB": k times the batch size
SECTIONS = ("prompt", "time", "main")
_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
_MAX_NODES = 50_000  # of a stranger's graph; UNets have some thousands
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


@dataclass(frozen=True)
class Ref:
    """The value of the node or graph input called ``name``."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Const:
    """The tensor called ``key`` in the parameter store."""

    key: str

    def __str__(self) -> str:
        return f"${self.key}"


@dataclass(eq=False)
class Node:
    """One operation. ``section`` says what its value depends on: prompt (conditioning only), time (the timestep,
    not the latents) or main (the latents)."""

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[Dim, ...] = ()
    section: str = "main"

    def refs(self) -> Iterator[str]:
        """Names of the values this node reads, repeated as often as it reads them."""
        for value in _leaves((self.args, self.kwargs)):
            if isinstance(value, Ref):
                yield value.name

    def consts(self) -> Iterator[str]:
        """Keys of the parameters this node reads."""
        for value in _leaves((self.args, self.kwargs)):
            if isinstance(value, Const):
                yield value.key

    def rename(self, names: dict[str, str]) -> None:
        """Read from other values: every reference to a key of ``names`` becomes one to its value."""
        if any(name in names for name in self.refs()):
            self.args = map_leaves(self.args, lambda v: _renamed(v, names))
            self.kwargs = map_leaves(self.kwargs, lambda v: _renamed(v, names))

    def __str__(self) -> str:
        arguments = [_show(a) for a in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs.items()]
        return f"%{self.name}: {list(self.shape)} = {self.op}({', '.join(arguments)})"


@dataclass
class Graph:
    """Nodes in execution order, the inputs (name to shape; "sample" and "timestep" first) and the output's name."""

    inputs: dict[str, tuple[Dim, ...]]
    nodes: list[Node]
    output: str

    def node(self, name: str) -> Node:
        """The node called ``name``."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def users(self) -> dict[str, list[Node]]:
        """Which nodes read each value; the graph's output counts as no reader."""
        users: dict[str, list[Node]] = {name: [] for name in self.inputs}
        users.update({node.name: [] for node in self.nodes})
        for node in self.nodes:
            for name in dict.fromkeys(node.refs()):
                users[name].append(node)
        return users

    def quantizer_of(self) -> dict[str, Node]:
        """The quantiser behind each quantised value: itself, or the one that layout changes lead back to."""
        sources: dict[str, Node] = {}
        for node in self.nodes:
            if node.kwargs.get("site") is not None:
                sources[node.name] = node
            elif node.op in ("int_gemm", "int_conv2d"):
                continue
            elif node.args and isinstance(node.args[0], Ref) and node.args[0].name in sources:
                sources[node.name] = sources[node.args[0].name]
        return sources

    def prune(self) -> None:
        """Remove nodes that the output does not depend on."""
        needed = {self.output}
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.refs())
        self.nodes = [node for node in self.nodes if node.name in needed]

    def validate(self, operators: frozenset[str]) -> None:
        """Raise ValueError unless every operator is listed and every value is defined before it is read."""
        seen = set(self.inputs)
        for node in self.nodes:
            if node.op not in operators:
                raise ValueError(f"node {node.name!r}: operator {node.op!r:.100} is not in the list of known operators")
            if node.section not in SECTIONS:
                raise ValueError(
                    f"node {node.name!r}: section {node.section!r:.100} is not one of {', '.join(SECTIONS)}"
                )
            missing = [name for name in node.refs() if name not in seen]
            if missing:
                raise ValueError(f"node {node.name!r} reads %{missing[0]}, which no earlier node defines")
            if node.name in seen:
                raise ValueError(f"node {node.name!r} is defined twice")
            seen.add(node.name)
        if self.output not in seen:
            raise ValueError(f"output %{self.output} is not defined")

    def __str__(self) -> str:
        header = ", ".join(f"%{name}: {list(shape)}" for name, shape in self.inputs.items())
        lines = [f"graph({header}) -> %{self.output}"]
        section = ""
        for node in self.nodes:
            if node.section != section:
                section = node.section
                lines.append(f"  # {section}")
            lines.append(f"  {node}")
        return "\n".join(lines)


def sizes(shape: tuple[Dim, ...], batch: int) -> tuple[int, ...]:
    """Concrete sizes of a shape for a batch."""
    return tuple(d if isinstance(d, int) else int(d[:-1] or 1) * batch for d in shape)


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every leaf of nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_leaves(v, function) for k, v in value.items()}
    return function(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _renamed(value: Any, names: dict[str, str]) -> Any:
    return Ref(names[value.name]) if isinstance(value, Ref) and value.name in names else value


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(_show(v) for v in value)}]"
    return str(value)


def to_json(graph: Graph) -> dict[str, Any]:
    """Plain JSON values: ``{"inputs", "nodes": [{"name", "op", "args", "kwargs", "shape", "section"}], "output"}``."""
    return {
        "inputs": {name: list(shape) for name, shape in graph.inputs.items()},
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "args": [_encode(a) for a in node.args],
                "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
                "shape": list(node.shape),
                "section": node.section,
            }
            for node in graph.nodes
        ],
        "output": graph.output,
    }


def from_json(data: Any, operators: frozenset[str]) -> Graph:
    """Inverse of `to_json` for untrusted data.

    Raises:
        ValueError: a field is missing or has the wrong type, an operator is not in ``operators``, or a value is
            read before it is defined; the message names the node and the field.
    """
    _expect(data, dict, "graph")
    inputs = {_name(k, "inputs"): _shape(v, f"inputs.{k}") for k, v in _field(data, "inputs", dict, "graph").items()}
    nodes = []
    if len(_field(data, "nodes", list, "graph")) > _MAX_NODES:
        raise ValueError(f"graph.nodes must be at most {_MAX_NODES}, got {len(data['nodes'])}")
    for i, item in enumerate(data["nodes"]):
        _expect(item, dict, f"nodes[{i}]")
        name = _name(_field(item, "name", str, f"nodes[{i}]"), f"nodes[{i}].name")
        where = f"node {name!r}"
        nodes.append(
            Node(
                name,
                _field(item, "op", str, where),
                tuple(_decode(a, where) for a in _field(item, "args", list, where)),
                {_name(k, where): _decode(v, where) for k, v in _field(item, "kwargs", dict, where).items()},
                _shape(_field(item, "shape", list, where), f"{where}.shape"),
                _field(item, "section", str, where),
            )
        )
    graph = Graph(inputs, nodes, _name(_field(data, "output", str, "graph"), "output"))
    graph.validate(operators)
    return graph


def _encode(value: Any) -> Any:
    if isinstance(value, Ref | Const):
        return str(value)
    if isinstance(value, torch.dtype) and value in _DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return [_encode(v) for v in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and value == value):
        return value
    if isinstance(value, str) and not value.startswith(("%", "$")):
        return value
    raise TypeError(f"a graph argument of type {type(value).__name__} cannot be serialised: {value!r}")


def _decode(value: Any, where: str, depth: int = 0) -> Any:
    if depth > 4:
        raise ValueError(f"{where}: arguments are nested too deeply")
    if isinstance(value, list):
        return tuple(_decode(v, where, depth + 1) for v in value)
    if isinstance(value, dict):
        if set(value) == {"dtype"} and isinstance(value["dtype"], str) and value["dtype"] in DTYPES:
            return DTYPES[value["dtype"]]
        if set(value) == {"float"} and value["float"] in ("inf", "-inf"):
            return float(value["float"])
        raise ValueError(f"{where}: {value!r:.100} is not a known argument")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {value} is beyond 64 bits")
    if isinstance(value, str) and value.startswith("%"):
        return Ref(_name(value[1:], where))
    if isinstance(value, str) and value.startswith("$"):
        return Const(_name(value[1:], where))
    return value


def _expect(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {kind.__name__}, got {type(value).__name__}")


def _field(data: dict, key: str, kind: type, where: str) -> Any:
    if key not in data:
        raise ValueError(f"{where}: field {key!r} is missing")
    _expect(data[key], kind, f"{where}.{key}")
    return data[key]


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{where}: {value!r:.100} is not a valid name")
    return value


def _shape(value: Any, where: str) -> tuple[Dim, ...]:
    _expect(value, list, where)
    for dim in value:
        whole = isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 2**31
        if not whole and not (isinstance(dim, str) and re.fullmatch(r"[0-9]{0,9}B", dim)):
            raise ValueError(f"{where}: {dim!r:.100} is not a size")
    return tuple(value)
