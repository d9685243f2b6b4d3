"""module -> Graph of ATen operators: torch.export with a dynamic batch, then dropout, assertions and copies removed."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .interpret import flatten_conditioning
from .ir import Const, Dim, Graph, Node, Ref, to_json
from .operators import ALIASES, FLOAT_OPS, IDENTITY_OPS
from .sections import mark_sections

_BATCH = 2  # traced with two samples: export specialises sizes 0 and 1
_MAX_BATCH = 63  # diffusers' upsampler guards batch < 64; the graph keeps no guards and is valid beyond it
_DROPPED = frozenset({"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"})
_SYMBOLIC = {
    operator.add: "sym_add",
    operator.sub: "sym_sub",
    operator.mul: "sym_mul",
    operator.floordiv: "sym_floordiv",
    operator.getitem: "getitem",
}


@dataclass
class Capture:
    """A captured module: its graph, the tensors it reads, and the hash of its parameters."""

    graph: Graph
    constants: dict[str, Tensor]
    model_hash: str
    config: dict[str, Any]


class _Entry(nn.Module):
    """The module under one calling convention: (sample, timestep [B], {keyword: tensor}) -> tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.keywords = {"return_dict": False} if "return_dict" in inspect.signature(net.forward).parameters else {}

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Any]) -> Tensor:
        output = self.net(sample, timestep, **conditioning, **self.keywords)
        found = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
        if not isinstance(found, Tensor):
            raise TypeError(f"its forward must return a tensor, a tuple or an object with .sample, got {type(found)}")
        return found


def capture(unet: nn.Module, shape: tuple[int, ...], conditioning: Mapping[str, Any] | None = None) -> Capture:
    """Capture ``unet`` as a graph valid for any batch size.

    Args:
        unet: a module with ``forward(sample, timestep, **conditioning)``; captured in float32 and eval mode,
            left unchanged.
        shape: (C, H, W) of one sample.
        conditioning: keyword arguments of ``forward``, tensors of any batch size or nested mappings of them.

    Raises:
        ValueError: the module cannot be exported, or uses an operator the engine does not know.
    """
    net = _float_eval(unet)
    sample = torch.zeros(_BATCH, *shape)
    timestep = torch.full((_BATCH,), 500)
    extra = {k: _pair(v) for k, v in (conditioning or {}).items()}
    batch = torch.export.Dim("batch", min=2, max=_MAX_BATCH)
    dynamic = ({0: batch}, {0: batch}, _like(extra, {0: batch}))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Entry(net).eval(), (sample, timestep, extra), dynamic_shapes=dynamic, strict=False
            )
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:  # export fails with many types; the cause is kept
        raise ValueError(
            f"unet of type {type(unet).__name__} cannot be captured by torch.export for shape {list(shape)}: "
            f"{_export_failure(error)}"
        ) from error
    graph, constants = _convert(program)
    unknown = sorted(set(graph.inputs) - {"sample", "timestep", *flatten_conditioning(extra)})
    if unknown:
        raise ValueError(
            f"conditioning must have distinct names of lower-case letters, digits and '_'; torch.export calls "
            f"{', '.join(map(repr, unknown))} what it was given"
        )
    mark_sections(graph)
    try:
        to_json(graph)  # what cannot be saved is known before the long work
    except TypeError as error:
        raise ValueError(f"unet of type {type(unet).__name__} cannot be captured: {error}") from error
    return Capture(graph, constants, hash_parameters(unet), _config(unet))


def _export_failure(error: Exception) -> str:
    """The cause of a failed export, in one line."""
    text = str(error).strip()
    if "Constraints violated (batch)" in text:
        return "its code fixes the batch size, as len(x) and int(x.shape[0]) do; x.shape[0] and x.size(0) follow it"
    return text.splitlines()[0] if text else type(error).__name__


def _float_eval(unet: nn.Module) -> nn.Module:
    floating = [p.dtype for p in unet.parameters() if p.is_floating_point()]
    on_cpu = all(p.device.type == "cpu" for p in unet.parameters())
    if not unet.training and on_cpu and all(dtype == torch.float32 for dtype in floating):
        return unet
    return copy.deepcopy(unet).cpu().float().eval()


def _pair(value: Any) -> Any:
    """The first two samples of a conditioning tensor, repeated when there is one."""
    if isinstance(value, Mapping):
        return {k: _pair(v) for k, v in value.items()}
    if not isinstance(value, Tensor) or value.dim() < 1 or value.shape[0] < 1:
        raise TypeError(f"conditioning must map names to tensors with a batch dimension, got {type(value).__name__}")
    value = value[:_BATCH].cpu()
    value = value.float() if value.is_floating_point() else value
    return value if len(value) == _BATCH else torch.cat([value, value])


def _like(value: Any, leaf: Any) -> Any:
    return {k: _like(v, leaf) for k, v in value.items()} if isinstance(value, dict) else leaf


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def hash_parameters(net: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config(unet: nn.Module) -> dict[str, Any]:
    """The module's own configuration as JSON values, where it has one (diffusers' ``config``)."""
    config = getattr(unet, "config", None)
    return _plain(dict(config)) if isinstance(config, Mapping) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_name_or_path")}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    plain = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)


def _convert(program: torch.export.ExportedProgram) -> tuple[Graph, dict[str, Tensor]]:
    """The exported program as our graph and parameter store; identities and assertions vanish."""
    signature = program.graph_signature
    stores: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.state_dict, **program.constants}
    values: dict[str, Any] = {}  # fx node name -> Ref, Const
    constants: dict[str, Tensor] = {}
    inputs: dict[str, tuple[Dim, ...]] = {}
    nodes: list[Node] = []
    output = ""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in stores:
            source = stores[node.name]
            key = source.removeprefix("net.")
            constants[key] = tensors[source].detach()
            values[node.name] = Const(key)
        elif node.op == "placeholder":
            name = _input_name(node.name)
            inputs[name] = _shape(node)
            values[node.name] = Ref(name)
        elif node.op == "output":
            output = values[node.args[0][0].name].name
        else:
            _convert_call(node, values, nodes)
    graph = Graph(inputs, nodes, output)
    graph.prune()
    used = {key for node in graph.nodes for key in node.consts()}
    return graph, {key: value for key, value in constants.items() if key in used}


def _input_name(name: str) -> str:
    """ "conditioning_added_cond_kwargs_text_embeds" -> "added_cond_kwargs_text_embeds"."""
    return name.removeprefix("conditioning_")


def _convert_call(node: torch.fx.Node, values: dict[str, Any], nodes: list[Node]) -> None:
    name = _operator_name(node)
    if name in _DROPPED:
        return
    arguments = [_argument(a, values) for a in node.args]
    keywords = {
        k: _argument(v, values)
        for k, v in node.kwargs.items()
        if k not in ("device", "pin_memory", "layout", "memory_format", "copy", "non_blocking") and v is not None
    }
    if name in IDENTITY_OPS or _is_identity(name, node, arguments, keywords):
        values[node.name] = arguments[0]
        return
    if name == "_to_copy":
        name, arguments, keywords = "to", [arguments[0], keywords["dtype"]], {}
    if name == "to":  # overloads carry devices and flags; the graph keeps the dtype
        dtypes = [a for a in [*arguments[1:], *keywords.values()] if isinstance(a, torch.dtype)]
        arguments, keywords = [arguments[0], dtypes[0]], {}
    if name not in FLOAT_OPS:
        raise ValueError(f"operator aten.{name} (node {node.name}) is not one the engine knows")
    if name == "split":
        name = "split_with_sizes" if isinstance(arguments[1], list | tuple) else name
    nodes.append(Node(node.name, name, tuple(arguments), keywords, _shape(node)))
    values[node.name] = Ref(node.name)


def _operator_name(node: torch.fx.Node) -> str:
    target = node.target
    if target in _SYMBOLIC:
        return _SYMBOLIC[target]
    packet = getattr(target, "_overloadpacket", None) or getattr(target, "overloadpacket", None)
    if packet is not None:
        name = packet.__name__.rsplit(".", 1)[-1]
        return ALIASES.get(name, name)
    return getattr(target, "__name__", str(target))


def _is_identity(name: str, node: torch.fx.Node, arguments: list[Any], keywords: dict[str, Any]) -> bool:
    """x / 1, x * 1, x + 0, and casts to the dtype x already has."""
    if name in ("div", "mul") and len(arguments) == 2 and not keywords:
        return isinstance(arguments[1], int | float) and arguments[1] == 1 and _floating(node.args[0])
    if name in ("add", "sub") and len(arguments) == 2 and not keywords:
        return isinstance(arguments[1], int | float) and arguments[1] == 0
    if name in ("to", "_to_copy", "type_as"):
        source: Any = node.args[0]
        return source.meta["val"].dtype == node.meta["val"].dtype
    return False


def _floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _argument(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, torch.fx.Node):
        return values[value.name]
    if isinstance(value, list | tuple):
        return tuple(_argument(v, values) for v in value)
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return None
    return value


def _shape(node: torch.fx.Node) -> tuple[Dim, ...]:
    value = node.meta.get("val")
    return tuple(_dim(d) for d in value.shape) if isinstance(value, Tensor) else ()


def _dim(size: Any) -> Dim:
    """A size as an integer, or as "kB" where it is k times the batch."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    at_two, at_three = (int(expression.subs(dict.fromkeys(expression.free_symbols, b))) for b in (2, 3))
    factor = at_three - at_two
    if factor == 0:
        return at_two
    if at_two != 2 * factor:
        raise ValueError(f"size {size} is not a multiple of the batch size")
    return f"{factor}B" if factor != 1 else "B"
