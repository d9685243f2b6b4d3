"""What each value depends on, so that work that repeats over steps or over samples is done once.

``prompt``: conditioning only, such as text keys and values: computed once per prompt.
``time``: the timestep (and conditioning), not the latents: floating point, exact, cached by timestep.
``main``: the latents.
"""

from __future__ import annotations

from .ir import Graph

SAMPLE, TIMESTEP, VECTOR, SEQUENCE = "sample", "timestep", "vector", "sequence"


def dependencies(graph: Graph) -> dict[str, frozenset[str]]:
    """Kinds of input that each value depends on: sample, timestep, vector ([B] or [B, C]) or sequence conditioning."""
    kinds: dict[str, frozenset[str]] = {}
    for name, shape in graph.inputs.items():
        other = VECTOR if len(shape) <= 2 else SEQUENCE
        kinds[name] = frozenset({name if name in (SAMPLE, TIMESTEP) else other})
    for node in graph.nodes:
        # a batch size is known before any value is
        sources = () if node.op == "sym_size" else (kinds[name] for name in node.refs())
        kinds[node.name] = frozenset().union(*sources)
    return kinds


def section_of(kinds: frozenset[str]) -> str:
    """The section of a value that depends on ``kinds``."""
    if SAMPLE in kinds:
        return "main"
    return "time" if TIMESTEP in kinds else "prompt"


def mark_sections(graph: Graph) -> None:
    """Set every node's section, and order the nodes prompt, time, main (which keeps definitions before uses)."""
    kinds = dependencies(graph)
    for node in graph.nodes:
        node.section = section_of(kinds[node.name])
    graph.nodes.sort(key=lambda node: ("prompt", "time", "main").index(node.section))
