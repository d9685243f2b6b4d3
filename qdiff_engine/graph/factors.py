"""Channel equalisation in a graph: a quantiser that divides its input's channels by c, and who reads its result.

Such a node has ``channel_inverse``, the key of a float32 [C] tensor 1 / c: it quantises x[k] / c[k], and the weights of
the layers behind it hold w[n, k] c[k], so that their products are those of x and w.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .ir import Const, Graph, Node

FACTORS = "channel_inverse"
LIMIT = 256.0  # 1 / LIMIT <= c <= LIMIT: no channel is multiplied away, and float16 holds what is left
_QUANTIZERS = frozenset({"quantize", "groupnorm_silu_quantize", "layernorm_quantize"})


def channel_axis(op: str, dims: int) -> int:
    """The axis of a quantiser's result along which its channels lie, as the operators define it."""
    return 1 if op == "groupnorm_silu_quantize" or (op == "quantize" and dims == 4) else -1


def divided(x: Tensor, channel_inverse: Tensor | None, axis: int) -> Tensor:
    """x[..., k, ...] channel_inverse[k], k along ``axis``, in x's dtype; x itself without factors."""
    if channel_inverse is None:
        return x
    shape = [1] * x.dim()
    shape[axis] = -1
    return (x * channel_inverse.reshape(shape)).to(x.dtype)  # in float32 at least, as the weights' factors are


def readers(graph: Graph) -> dict[str, list[tuple[Node, int]]]:
    """Site -> the layers that multiply its values, each with the K segment they are."""
    sources = graph.quantizer_of()
    found: dict[str, list[tuple[Node, int]]] = {}
    for node in graph.nodes:
        if node.op in ("int_conv2d", "int_gemm"):
            for segment, ref in enumerate(node.args):
                found.setdefault(sources[ref.name].kwargs["site"], []).append((node, segment))
    return found


def factor_keys(graph: Graph) -> set[str]:
    """Keys of the constants that are factors; none where nothing is equalised."""
    found = (node.kwargs.get(FACTORS) for node in graph.nodes)
    return {value.key for value in found if isinstance(value, Const)}


def check_factors(graph: Graph, constants: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every ``channel_inverse`` is float32 [C] of its quantiser, within [1 / LIMIT, LIMIT]."""
    for node in graph.nodes:
        key = node.kwargs.get(FACTORS)
        if key is None:
            continue
        if node.op not in _QUANTIZERS or not isinstance(key, Const):
            raise ValueError(f"node {node.name!r}: {FACTORS} must name the factors of a quantiser, got {key!s:.100}")
        values, channels = constants[key.key], node.shape[channel_axis(node.op, len(node.shape))]
        if values.dtype != torch.float32 or tuple(values.shape) != (channels,):
            found = f"{values.dtype} {list(values.shape)}"
            raise ValueError(f"constant.{key.key} must be torch.float32 [{channels}], got {found}")
        if not bool(((values >= 1 / LIMIT) & (values <= LIMIT)).all()):
            raise ValueError(f"constant.{key.key} must lie in [1/{LIMIT:g}, {LIMIT:g}]")
