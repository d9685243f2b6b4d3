"""Blocks of layers that are reconstructed together, found from the graph: no class of module is known by name."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.ir import Graph, Node
from ..graph.operators import LAYOUT_OPS
from .layers import LAYERS

_MOST_LAYERS = 12  # in a block: more of them are reconstructed layer by layer


@dataclass(frozen=True)
class Block:
    """Neighbouring nodes; the last layer among them makes the value that reconstruction compares.

    The blocks of a graph hold every node once, in order; one without layers only passes values on.
    """

    nodes: tuple[Node, ...]

    @property
    def layers(self) -> tuple[Node, ...]:
        """The layers that are reconstructed together."""
        return tuple(node for node in self.nodes if node.op in LAYERS)

    @property
    def exit(self) -> str:
        """The value that is compared."""
        return self.layers[-1].name

    @property
    def body(self) -> tuple[Node, ...]:
        """The nodes that the exit depends on, in order."""
        needed, body = {self.exit}, []
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.refs())
                body.append(node)
        return tuple(reversed(body))

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the values that the body reads from outside."""
        body = self.body
        own = {node.name for node in body}
        return tuple(dict.fromkeys(name for node in body for name in node.refs() if name not in own))


def find_blocks(graph: Graph) -> list[Block]:
    """The graph's nodes in blocks: a residual's branch with the layer that adds it up, else a layer of its own.

    A block ends where one value is all that later nodes read of it, and that value ends a residual's branch (it is
    added up in a layer's epilogue) or begins one (several nodes read it). Layers of the prompt stand alone.
    """
    last_read = {name: len(graph.nodes) for name in (graph.output,)}
    readers: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        for name in set(node.refs()):
            last_read[name] = max(last_read.get(name, 0), i)
            readers[name] = readers.get(name, 0) + 1
    blocks: list[Block] = []
    begin = 0
    for i, node in enumerate(graph.nodes):
        pending = [n.name for n in graph.nodes[begin : i + 1] if last_read.get(n.name, -1) > i]
        alone = node.section != "main" and (i + 1 == len(graph.nodes) or graph.nodes[i + 1].section == "main")
        if alone or i == len(graph.nodes) - 1 or (pending == [node.name] and _is_joint(node, readers)):
            blocks += _small_enough(graph.nodes[begin : i + 1], together=node.section == "main")
            begin = i + 1
    assert sum(len(block.nodes) for block in blocks) == len(graph.nodes)
    return blocks


def _is_joint(node: Node, readers: dict[str, int]) -> bool:
    """Whether a residual's branch ends or begins at ``node``."""
    if node.op in LAYERS and node.kwargs["residual"] is not None:
        return True
    return node.section == "main" and node.op in {*LAYERS, *LAYOUT_OPS, "add"} and readers.get(node.name, 0) > 1


def _small_enough(nodes: list[Node], together: bool) -> list[Block]:
    """One block, or one per layer where there are too many layers for one."""
    whole = Block(tuple(nodes))
    if len(whole.layers) <= 1 or (together and len(whole.layers) <= _MOST_LAYERS):
        return [whole]
    blocks, begin = [], 0
    for i, node in enumerate(nodes):
        if node.op in LAYERS:
            blocks.append(Block(tuple(nodes[begin : i + 1])))
            begin = i + 1
    return blocks + ([Block(tuple(nodes[begin:]))] if begin < len(nodes) else [])
