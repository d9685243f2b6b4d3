"""Small tools that graph passes share: find a producer, insert before, replace, give fresh names."""

from __future__ import annotations

from typing import Any

from .ir import Graph, Node, Ref


class Rewriter:
    """A graph being changed, with the indices that passes ask for; whoever changes a node itself calls `refresh`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the indices after nodes came, went or changed what they read."""
        self.by_name = {node.name: node for node in self.graph.nodes}
        self.users = self.graph.users()
        self.position = {node.name: i for i, node in enumerate(self.graph.nodes)}

    def producer(self, value: Any) -> Node | None:
        """The node that computes ``value``; None for graph inputs, constants and literals."""
        return self.by_name.get(value.name) if isinstance(value, Ref) else None

    def shape(self, value: Any) -> tuple[Any, ...]:
        """Shape of a node's value or of a graph input."""
        node = self.producer(value)
        return node.shape if node else self.graph.inputs[value.name]

    def only_user(self, node: Node) -> Node | None:
        """The single reader of ``node``'s value, or None when there are others or it is the graph's output."""
        users = self.users[node.name]
        return users[0] if len(users) == 1 and self.graph.output != node.name else None

    def fresh(self, stem: str) -> str:
        """A name no node has yet."""
        name, count = stem, 0
        while name in self.by_name or name in self.graph.inputs:
            count += 1
            name = f"{stem}_{count}"
        return name

    def insert_before(self, node: Node, *new: Node) -> None:
        """Place ``new`` nodes just ahead of ``node``."""
        at = self.graph.nodes.index(node)
        self.graph.nodes[at:at] = new
        self.refresh()

    def move_behind(self, node: Node, other: Node) -> None:
        """Place ``node`` right behind ``other``, which becomes all that it reads."""
        self._forget_reads(node)
        node.args = (Ref(other.name),)
        self.users[other.name].append(node)
        self.graph.nodes.remove(node)
        self.graph.nodes.insert(self.graph.nodes.index(other) + 1, node)
        self.position = {moved.name: i for i, moved in enumerate(self.graph.nodes)}

    def replace_value(self, old: str, new: str) -> None:
        """Everything that read ``old`` reads ``new``."""
        moved, known = self.users.get(old, []), self.users.get(new, [])
        for user in moved:
            user.rename({old: new})
        if self.graph.output == old:
            self.graph.output = new
        readers = [*known, *(user for user in moved if user not in known)]
        self.users[new] = sorted(readers, key=lambda user: self.position[user.name])
        self.users[old] = []

    def remove(self, node: Node) -> None:
        """Drop a node that nobody reads any more; the others keep their order."""
        self._forget_reads(node)
        self.graph.nodes.remove(node)
        del self.by_name[node.name], self.users[node.name], self.position[node.name]

    def _forget_reads(self, node: Node) -> None:
        for name in dict.fromkeys(node.refs()):
            self.users[name] = [user for user in self.users[name] if user is not node]
