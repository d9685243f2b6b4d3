"""The operators a graph may contain: floating-point ATen operators by name, and the engine's integer operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTEGER_OPS = frozenset({"quantize", "groupnorm_silu_quantize", "layernorm_quantize", "int_gemm", "int_conv2d"})

# elementwise permutations of one tensor: quantisation commutes with them
_LAYOUT = "view reshape transpose permute flatten unflatten squeeze unsqueeze movedim t"
LAYOUT_OPS = frozenset(_LAYOUT.split())

_ATEN = """
add sub rsub mul div neg pow sqrt rsqrt exp log sin cos tanh sigmoid abs clamp clamp_min clamp_max maximum minimum
reciprocal square floor_divide remainder floor ceil round erf sign where eq ne lt le gt ge logical_and logical_or
logical_not silu gelu relu relu6 leaky_relu hardswish hardsigmoid hardtanh mish elu celu selu softplus softmax _softmax
log_softmax glu prelu transpose permute flatten unflatten squeeze unsqueeze movedim t expand expand_as repeat cat stack
chunk split split_with_sizes slice select narrow unbind tile repeat_interleave pixel_shuffle pixel_unshuffle
channel_shuffle roll flip mean sum amax amin var std linalg_vector_norm cumsum conv2d conv1d conv3d conv_transpose1d
conv_transpose2d linear matmul mm bmm addmm baddbmm einsum scaled_dot_product_attention avg_pool2d max_pool2d
adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d constant_pad_nd pad reflection_pad2d
replication_pad2d group_norm layer_norm batch_norm instance_norm rms_norm arange ones zeros full ones_like zeros_like
full_like scalar_tensor embedding index_select gather index masked_fill tril triu type_as lerp addcmul addcdiv outer
_weight_norm mT numpy_T
"""

# they make a tensor of numbers alone: where, is not the graph's business
FACTORY_OPS = frozenset({"arange", "ones", "zeros", "full", "scalar_tensor"})

# dropped at capture, for at inference they return their first argument
_IDENTITY = "dropout feature_dropout alpha_dropout alias detach contiguous clone lift_fresh lift_fresh_copy"
IDENTITY_OPS = frozenset(_IDENTITY.split())

# other names of the same operators, told apart by torch and by nothing else
ALIASES = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
}


def _reshape(x: Tensor, *shape: Any) -> Tensor:
    """``view`` as the graph means it: its inputs may be channels-last here, where a strict view does not exist."""
    return x.reshape(*shape)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.to(*args, **kwargs)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *rest: Any, **more: Any
) -> Tensor:
    """``conv2d`` as the graph spells it: the padding may be (top, bottom, left, right)."""
    if isinstance(padding, tuple) and len(padding) == 4:
        top, bottom, left, right = padding
        x, padding = torch.nn.functional.pad(x, (left, right, top, bottom)), 0
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, *rest, **more)


def _size(operation: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """An operation on sizes, whose result is one: a stranger's chain of products would fill the memory with digits."""

    def of_sizes(a: int, b: int) -> int:
        result = operation(a, b)
        if not -(2**63) <= result < 2**63:
            raise ValueError(f"a size of the graph must have at most 64 bits, got {operation.__name__}({a}, {b})")
        return result

    return of_sizes


def _packet(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.aten, name)


_KNOWN = [name for name in _ATEN.split() if hasattr(torch.ops.aten, name)]
FLOAT_OPS: dict[str, Callable[..., Any]] = {name: _packet(name) for name in _KNOWN}
FLOAT_OPS.update(
    {
        "view": _reshape,
        "reshape": _reshape,
        "to": _to,
        "getitem": operator.getitem,
        "sym_size": lambda x, dim: x.shape[dim],
        "sym_add": _size(operator.add),
        "sym_sub": _size(operator.sub),
        "sym_mul": _size(operator.mul),
        "sym_floordiv": _size(operator.floordiv),
        "conv2d": _conv2d,
        "linear": torch.nn.functional.linear,
        "silu": torch.nn.functional.silu,
        # of torch and not of torch.ops.aten, so that ``with torch.device(...)`` says where they make their results
        **{name: getattr(torch, name) for name in FACTORY_OPS},
        "scaled_dot_product_attention": torch.nn.functional.scaled_dot_product_attention,
    }
)
OPERATORS = frozenset(FLOAT_OPS) | INTEGER_OPS
