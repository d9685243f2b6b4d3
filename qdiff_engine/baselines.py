"""The float networks that the engine is timed beside: torch's ways to run one on a device, OpenVINO on a CPU."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .measuring import Contestant, autocast, channels_last, cuda_graph
from .sampling import moved, predict

# what a foreign package raises where it is missing or does not take a network
_REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
Baselines = tuple[dict[str, Contestant], dict[str, str]]  # contestants by name; why others are absent


class Inputs(NamedTuple):
    """The arguments of one forward pass."""

    sample: Tensor  # [B, C, H, W]
    timestep: Tensor  # [B], one value
    conditioning: dict[str, Any]


def float_contestants(
    unet: nn.Module | None, inputs: list[Inputs], device: torch.device, threads: int, compile_: bool = False
) -> Baselines:
    """The float baselines by name, and why others are absent.

    Args:
        compile_: on a GPU, torch.compile's too, which take minutes to compile.
    """
    if unet is None:
        return {}, {}
    if device.type == "cuda":
        return gpu_contestants(half_precision(unet, inputs[0]), inputs, compile_)
    return _cpu_contestants(channels_last(copy.deepcopy(unet).float().eval()), inputs, device, threads)


class _Autocast(nn.Module):
    """A float32 network whose products run in float16, for one whose code mixes dtypes."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        with torch.autocast(sample.device.type, torch.float16):
            return predict(self.unet, sample, timestep, conditioning)


def half_precision(unet: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy of ``unet`` in float16 where the inputs are; under autocast where its code refuses to be float16."""
    device = inputs.sample.device
    network = channels_last(copy.deepcopy(unet).eval().to(device, torch.float16))
    try:
        predict(network, *(moved(part, device, torch.float16) for part in inputs))
    except (RuntimeError, TypeError):
        return _Autocast(copy.deepcopy(unet).float().eval().to(device))
    return network


def tried(makers: Mapping[str, Callable[[], Contestant]]) -> Baselines:
    """Contestants, each run once; the ones that cannot be made or run go to the reasons."""
    contestants: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contestant = make()
            contestant(0)
            contestants[name] = contestant
        except _REFUSALS as error:
            absent[name] = first_line(error)
    return contestants, absent


def first_line(error: Exception) -> str:
    """An error's message as a reason to print: its first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def gpu_contestants(module: nn.Module, inputs: list[Inputs], compile_: bool) -> Baselines:
    """float16 on a GPU, channels_last: eager, replayed as a CUDA graph, compiled; torchao's int8 where installed.

    Args:
        module: from `half_precision`; changed to channels_last in place.
        inputs: of any floating dtype.
    """
    module = channels_last(module)
    device = inputs[0].sample.device
    halves = [Inputs(*(moved(part, device, torch.float16) for part in item)) for item in inputs]
    makers: dict[str, Callable[[], Contestant]] = {
        "torch-fp16": lambda: lambda i: predict(module, *halves[i]),
        "torch-fp16-graph": lambda: graph_contestant(module, halves),
    }
    slow: dict[str, Callable[[], Contestant]] = {
        "torch-fp16-compile": lambda: compiled_contestant(module, halves),
        "torchao-int8": lambda: torchao_contestant(module, halves),
    }
    contestants, absent = tried(makers | (slow if compile_ else {}))
    return contestants, absent | ({} if compile_ else dict.fromkeys(slow, "compiling takes minutes: ask for it"))


def graph_contestant(module: nn.Module, inputs: list[Inputs]) -> Contestant:
    """One CUDA graph for all input sets, which are copied to the addresses that it reads."""
    fixed = Inputs(inputs[0].sample.clone(), inputs[0].timestep.clone(), inputs[0].conditioning)
    replay = cuda_graph(lambda: predict(module, *fixed))

    def run(i: int) -> Tensor:
        fixed.sample.copy_(inputs[i].sample)
        fixed.timestep.copy_(inputs[i].timestep)
        return replay()

    return run


def compiled_contestant(module: nn.Module, inputs: list[Inputs]) -> Contestant:
    """torch.compile with everything it can do, CUDA graphs among it."""
    network = torch.compile(module, mode="max-autotune", dynamic=False)

    def run(i: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        sample, timestep, conditioning = inputs[i]
        output = network(sample, timestep, **conditioning, **_keywords(module))
        return output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)

    return run


def _keywords(module: nn.Module) -> dict[str, Any]:
    import inspect

    return {"return_dict": False} if "return_dict" in inspect.signature(module.forward).parameters else {}


def torchao_contestant(module: nn.Module, inputs: list[Inputs]) -> Contestant:
    """torchao's int8 linears with dynamic activation scales, compiled; its convolutions stay in float16."""
    torchao = importlib.import_module("torchao.quantization")
    network = copy.deepcopy(module)
    torchao.quantize_(network, torchao.Int8DynamicActivationInt8WeightConfig())
    return compiled_contestant(network, inputs)


def _cpu_contestants(module: nn.Module, inputs: list[Inputs], device: torch.device, threads: int) -> Baselines:
    def under(dtype: torch.dtype | None) -> Contestant:
        def run(i: int) -> Tensor:
            with autocast(device, dtype):
                return predict(module, *inputs[i])

        return run

    contestants, absent = tried(
        {
            "openvino-bf16": lambda: openvino_contestant(module, inputs, device, threads),
            "openvino-int8": lambda: openvino_int8_contestant(module, inputs, device, threads),
        }
    )
    return {"torch-fp32": under(None), "torch-bf16": under(torch.bfloat16), **contestants}, absent


class _Positional(nn.Module):
    """A UNet without conditioning as (sample, timestep) -> tensor, the form converters trace."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return predict(self.unet, sample, timestep, {})


def _openvino_model(module: nn.Module, inputs: list[Inputs], device: torch.device) -> tuple[Any, Any]:
    """(the openvino package, the converted network)."""
    openvino = importlib.import_module("openvino")
    if device.type != "cpu":
        raise ValueError(f"compared on the CPU only, not on {device.type}")
    if inputs[0].conditioning:
        raise ValueError("compared only for networks without conditioning")
    # converters trace under no_grad, which inference tensors do not allow
    with torch.inference_mode(False), torch.no_grad():
        example = (inputs[0].sample.clone(), inputs[0].timestep.clone())
        return openvino, openvino.convert_model(_Positional(module), example_input=example)


def _openvino_run(openvino: Any, network: Any, inputs: list[Inputs], precision: str, threads: int) -> Contestant:
    shapes = (inputs[0].sample.shape, inputs[0].timestep.shape)
    network.reshape({i: openvino.PartialShape(list(shape)) for i, shape in enumerate(shapes)})
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = openvino.compile_model(network, "CPU", options)
    arrays = [(item.sample.numpy(), item.timestep.numpy()) for item in inputs]
    return lambda i: torch.from_numpy(compiled(list(arrays[i]))[0])


def openvino_contestant(module: nn.Module, inputs: list[Inputs], device: torch.device, threads: int) -> Contestant:
    """OpenVINO with its bfloat16 hint."""
    openvino, network = _openvino_model(module, inputs, device)
    return _openvino_run(openvino, network, inputs, "bf16", threads)


def openvino_int8_contestant(module: nn.Module, inputs: list[Inputs], device: torch.device, threads: int) -> Contestant:
    """OpenVINO on the network that NNCF quantised to int8 with its defaults."""
    nncf = importlib.import_module("nncf")
    openvino, network = _openvino_model(module, inputs, device)
    samples = [(item.sample.numpy(), item.timestep.numpy()) for item in inputs]
    quantized = nncf.quantize(network, nncf.Dataset(samples, list), subset_size=len(samples))
    return _openvino_run(openvino, quantized, inputs, "bf16", threads)
