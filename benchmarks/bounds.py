"""The least time of a forward pass on a machine whose ceilings are known: layer by layer, the larger of two times.

Counted are the products (at the precision they run in) and the bytes that they, attention and norms must move; what
else a network does is taken as free, so this is a bound and no prediction.
"""

from __future__ import annotations

import math

from benchmarks.ceilings import Ceilings
from qdiff_engine.graph.ir import Node, Ref, sizes
from qdiff_engine.runtime.model import IntegerUNet

_HALF = 2.0  # bytes of a floating value between integer layers


def forward_bound_ms(model: IntegerUNet, batch: int, ceilings: Ceilings) -> float:
    """Milliseconds of one forward pass of ``batch`` samples in the mode of the table's first row."""
    return math.fsum(_node_ms(model, node, batch, ceilings) for node in model.graph.nodes if node.section == "main")


def _count(shape: tuple, batch: int) -> int:
    return math.prod(sizes(shape, batch))


def _node_ms(model: IntegerUNet, node: Node, batch: int, ceilings: Ceilings) -> float:
    if node.op in ("int_gemm", "int_conv2d"):
        return _layer_ms(model, node, batch, ceilings)
    if node.op == "scaled_dot_product_attention":
        q, k, v = (sizes(_shape(model, a), batch) for a in node.args[:3])
        products = 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        values = math.prod(q) + math.prod(k) + math.prod(v) + _count(node.shape, batch)
        return ceilings.bound_ms(products, _HALF * values, "fp16")
    if node.op in ("groupnorm_silu_quantize", "layernorm_quantize"):
        read = sum(_count(_shape(model, a), batch) for a in node.args if isinstance(a, Ref))
        written = _bytes(_bits(model, node)) * _count(node.shape, batch)
        return ceilings.bound_ms(0.0, _HALF * read + written, "a8")
    return 0.0


def _bits(model: IntegerUNet, quantizer: Node) -> int:
    """Of what a quantiser writes, in the table's first row."""
    return int(model.table.bits[0, model.table.sites.index(quantizer.kwargs["site"])])


def _bytes(bits: int) -> float:
    """Of a value between layers: 4-bit ones are packed where they can be."""
    return _HALF if bits == 16 else bits / 8


def _shape(model: IntegerUNet, ref: Ref) -> tuple:
    """Of a node's value, or of an input."""
    return model.graph.inputs[ref.name] if ref.name in model.graph.inputs else model.graph.node(ref.name).shape


def _layer_ms(model: IntegerUNet, node: Node, batch: int, ceilings: Ceilings) -> float:
    """All K segments of one integer layer, its output written once."""
    outputs, sources = _count(node.shape, batch), model.graph.quantizer_of()
    integer, floating, moved = 0.0, 0.0, _HALF * outputs
    for ref, weight in zip(node.args, model.weights[node.kwargs["layer"]], strict=True):
        bits = _bits(model, sources[ref.name])
        products = 2.0 * outputs * weight.values[0].numel()
        integer, floating = (integer, floating + products) if bits == 16 else (integer + products, floating)
        moved += weight.values.numel() * weight.bits / 8
        moved += _count(_shape(model, ref), batch) * _bytes(bits)
    compute = integer / ceilings.int8_tops / 1e9 + floating / ceilings.fp16_tops / 1e9
    return max(compute, moved / ceilings.copy_gbps / 1e6)
