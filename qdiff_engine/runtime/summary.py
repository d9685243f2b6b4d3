"""What an artifact holds: precisions, sizes, plan, and every layer with the reason why it is not on integers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graph.factors import factor_keys
from ..graph.ir import Const, Node, sizes
from ..graph.layers import float_reason, layer_name
from ..graph.sections import dependencies
from .artifact import FILES, Artifact, load_artifact
from .artifact_config import SCHEMA_VERSION, TABLE_FIELDS
from .files import previous_of
from .model import IntegerUNet
from .tuning import Timing

_FLOAT_BYTES, _FLOAT_BITS = 4, 32
_INTEGER_LAYERS = ("int_conv2d", "int_gemm")
_SLOWER = "measured here: faster in floating point, with the layers that share its input"

Quantised = IntegerUNet | Artifact


def inspect(
    source: IntegerUNet | str | os.PathLike[str], timings: Mapping[str, Timing] | None = None
) -> dict[str, Any]:
    """The JSON object of ``qdiff inspect``.

    Args:
        source: a quantised model, or the folder of an artifact.
        timings: measured with ``tune=True``; a model's own by default.

    Returns:
        schema_version, recipe, size_bytes (of the files; of the tensors for a model in memory), float_size_bytes (the
        same parameters in float32), rows, plan [{timestep, mode}], layers [{name, op, shape, weight_bits, quantized,
        reason}]: every integer layer, and every node that multiplies in floating point with the reason. ``shape`` is
        the weight's, or for products of activations the result's for one sample. Measured layers have integer_ms,
        float_ms and measured_with, the layers whose time is in theirs; one that is faster in floating point is not
        ``quantized``, and says so.

    Raises:
        OSError, ValueError: the artifact is missing or damaged.
    """
    if isinstance(source, IntegerUNet):
        model: Quantised = source
        size = tensor_bytes(model)
    else:
        model = load_artifact(source)
        folder = Path(source) if Path(source).is_dir() else previous_of(source)
        size = sum((folder / name).stat().st_size for name in FILES)
    table = model.table
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": model.recipe.to_dict(),
        "size_bytes": size,
        "float_size_bytes": float_bytes(model),
        "rows": len(table.timesteps),
        "plan": [{"timestep": t, "mode": mode} for t, mode in zip(table.timesteps, table.modes, strict=True)],
        "layers": layer_rows(model, timings),
    }


def float_bytes(model: Quantised) -> int:
    """Bytes of the model's parameters in float32."""
    elements = sum(math.prod(w.values.shape) for parts in model.weights.values() for w in parts)
    added = factor_keys(model.graph)
    kept = (value for key, value in model.constants.items() if key not in added)
    elements += sum(value.numel() for value in kept if value.is_floating_point())
    return _FLOAT_BYTES * elements


def tensor_bytes(model: Quantised) -> int:
    """Bytes of the model's tensors as an artifact stores them: packed integers, scales, constants, table."""
    tensors = [value for parts in model.weights.values() for w in parts for value in (w.stored(), w.scale)]
    tensors += [*model.constants.values(), *(getattr(model.table, name) for name in TABLE_FIELDS)]
    return sum(value.numel() * value.element_size() for value in tensors)


def layer_rows(model: Quantised, timings: Mapping[str, Timing] | None = None) -> list[dict[str, Any]]:
    """One row per node that multiplies, in execution order."""
    kinds = dependencies(model.graph)
    if timings is None:
        timings = model.timings if isinstance(model, IntegerUNet) else {}
    rows = []
    for node in model.graph.nodes:
        if node.op in _INTEGER_LAYERS:
            parts = model.weights[node.kwargs["layer"]]
            n, _, *taps = (*parts[0].values.shape,)
            shape = [n, sum(w.values.shape[1] for w in parts), *taps]
            timing = timings.get(node.kwargs["layer"])
            slower = timing is not None and timing.floating
            rows.append(_row(node.kwargs["layer"], node.op, shape, parts[0].bits, _SLOWER if slower else None))
            if timing is not None:
                times = {"integer_ms": timing.integer_ms, "float_ms": timing.float_ms}
                rows[-1] |= {**times, "measured_with": list(timing.measured_with)}
        elif (reason := float_reason(node, kinds[node.name], model.constants)) is not None:
            rows.append(_row(layer_name(node), node.op, _float_shape(node, model), _FLOAT_BITS, reason))
    return rows


def _row(name: str, op: str, shape: list[int], weight_bits: int, reason: str | None) -> dict[str, Any]:
    quantized = reason is None
    return {
        "name": name,
        "op": op,
        "shape": shape,
        "weight_bits": weight_bits,
        "quantized": quantized,
        "reason": reason,
    }


def _float_shape(node: Node, model: Quantised) -> list[int]:
    weight = node.args[1] if len(node.args) > 1 else None
    return list(model.constants[weight.key].shape if isinstance(weight, Const) else sizes(node.shape, 1))
