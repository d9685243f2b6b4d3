"""When a lowered graph's values are last read, and which of them a section hands on to a later one."""

from __future__ import annotations

from typing import Any

from ..graph.ir import Graph, Ref
from ..graph.operators import LAYOUT_OPS

_NORMS = ("groupnorm_silu_quantize", "layernorm_quantize")
_FRESH_OPS = frozenset({"int_gemm", "int_conv2d", "group_statistics", *_NORMS})


class Lifetimes:
    """Who reads the values of a graph; ``last_use``: value -> index of its last reader, in execution order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.refs()}
        self.alias_use = self._alias_use()

    def _alias_use(self) -> dict[str, int]:
        """Last reader of each value or of anything that may share its memory.

        That is any floating-point operator's result, and in mode A16 what a quantiser passes on.
        """
        use = dict(self.last_use)
        for node in reversed(self.graph.nodes):
            sharing = [(name, node.name) for name in node.refs()] if node.op not in _FRESH_OPS else []
            if node.op == "groupnorm_silu_quantize":
                sharing = [(node.args[i].name, copy) for i, copy in node.kwargs["copies"].items()]
            for name, other in sharing:
                use[name] = max(use.get(name, -1), use.get(other, -1))
        return use

    def needed_by(self, section: str) -> set[str]:
        """Nodes and graph inputs that a section's values are made of."""
        needed: set[str] = set()
        for node in reversed(self.graph.nodes):
            if node.section == section or node.name in needed:
                needed |= {node.name, *node.refs()}
        return needed

    def conditioning_read(self, section: str) -> list[str]:
        """Graph inputs beside the latents and the timestep that a section depends on."""
        needed = self.needed_by(section)
        return [name for name in self.graph.inputs if name in needed - {"sample", "timestep"}]

    def kept_after(self, section: str) -> list[str]:
        """Values made in ``section`` and read in a later one, in the order of the graph."""
        by_name = {node.name: node for node in self.graph.nodes}
        kept = {
            name
            for node in self.graph.nodes
            for name in node.refs()
            if name in by_name and by_name[name].section == section != node.section
        }
        return [node.name for node in self.graph.nodes if node.name in kept]

    def residual_dies(self, index: int, residual: Any) -> bool:
        """Whether the residual's memory may be overwritten: a layer's own result that nothing reads any more."""
        if not isinstance(residual, Ref) or residual.name in self.graph.inputs:
            return False
        producer = self.graph.node(residual.name)
        while producer.op in LAYOUT_OPS and producer.args[0].name not in self.graph.inputs:
            producer = self.graph.node(producer.args[0].name)
        fresh = producer.op in ("int_conv2d", "int_gemm") and producer.section == "main"
        kept = self.graph.output in (producer.name, residual.name)
        return fresh and not kept and self.alias_use[producer.name] == index
