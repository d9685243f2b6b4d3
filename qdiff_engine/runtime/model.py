"""IntegerUNet: the quantised network as a drop-in module, and `load`."""

from __future__ import annotations

import contextlib
import copy
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..graph.interpret import flatten_conditioning
from ..graph.ir import Const, Graph, Ref, sizes
from ..recipe import Recipe
from ..sampling import check_count, timestep_tensor
from ..tables import Correction, Noise, Table
from ..weights import QuantizedWeight
from .artifact import Artifact, load_artifact, save_artifact
from .artifact_config import ArtifactError
from .compiler import Compiler, make_rows
from .host_values import HostValues
from .lowering import lower_for_cpu, lower_for_gpu
from .program import Program
from .replay import CudaGraphs, ReplayedProgram, device_rows, run_again
from .tuning import Clock, Timing, cuda_clock, floating_sites, host_clock, measure, retabled


class UNetOutput(NamedTuple):
    """What a UNet returns: ``output.sample`` or ``output[0]``."""

    sample: Tensor  # [B, C, H, W]


class Config(dict):
    """The original network's configuration, read as keys or as attributes, as diffusers pipelines do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the unet's configuration has no {name!r}") from None


class IntegerUNet(nn.Module):
    """A UNet on real integers, called like the one it came from.

    ``model(sample, timestep, return_dict=False, **conditioning)[0]`` or ``model(sample, timestep).sample``; the row
    of the nearest calibrated timestep supplies scales and zero points, of an equal one corrections, too.
    ``pipe.unet = model`` works. It is saved by `save_pretrained`, not by pickle or ``torch.save``.

    Args:
        graph, weights, constants, table: what is executed; see `Artifact`.
        recipe, key, model_config: what was asked for, what it belongs to, the original configuration.
        device: "cpu" or "cuda".
        backend: a backend's name to insist on; the fastest available one by default.
        dtype: floating dtype between the integer layers; float32 on a CPU, by default float16 on a GPU.
        graphs: replay CUDA graphs on a GPU; False launches kernel by kernel.
        correction, noise: what `qdiff_engine.correct` and `measure_noise` found, if they ran. The output's correction
            is in the table, and applied at the calibrated timesteps unless `corrects` is False.
        check: look for NaN and values out of range in every call's tensors, for which the host waits for a GPU; by
            default on a CPU only.
        tune: measure every integer layer against floating point here, for ``tune_batch`` samples, and keep the faster:
            see `tuning`. ``timings`` then holds both times by layer. A layer left in floating point also keeps its
            weights in ``dtype``.
        clock: measures for ``tune``; by default the device's own.
    """

    def __init__(
        self,
        graph: Graph,
        weights: dict[str, tuple[QuantizedWeight, ...]],
        constants: dict[str, Tensor],
        table: Table,
        recipe: Recipe,
        key: dict[str, Any],
        model_config: dict[str, Any],
        device: str | torch.device = "cpu",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        graphs: bool = True,
        check: bool | None = None,
        tune: bool = False,
        tune_batch: int = 2,
        clock: Clock | None = None,
        correction: Correction | None = None,
        noise: Noise | None = None,
    ) -> None:
        super().__init__()
        check_count("tune_batch", tune_batch)
        self.graph, self.weights, self.constants, self.table = graph, weights, constants, table
        self.recipe, self.key, self.model_config = recipe, key, model_config
        self.config = Config(model_config)
        self.correction, self.noise = correction, noise
        self._warned = False  # that corrections are off at a timestep
        self._device = _usable_device(device, backend)
        self._categories = _categories(graph, constants)
        self._dtype = _usable_dtype(dtype, self._device)
        self._check = self._device.type == "cpu" if check is None else check
        self._host = HostValues()
        self.timings: dict[str, Timing] = {}
        on_cpu = self._device.type == "cpu"
        if tune:
            lowered = lower_for_cpu(graph) if on_cpu else lower_for_gpu(graph)
            compiler = Compiler(lowered, weights, constants, table, self._device, backend, self._dtype)
            rows = list(make_rows(table, compiler.output_bias)) if on_cpu else device_rows(table, self._device)
            clock = clock or (host_clock if on_cpu else cuda_clock(self._device))
            self.timings = measure(compiler, rows, table, tune_batch, clock)
            table = retabled(table, floating_sites(graph, self.timings))
        floating = {name for name, timing in self.timings.items() if timing.floating}
        parts = (graph, weights, constants, table, self._device, backend)
        self.program: Program
        if on_cpu:
            self.program = Program(*parts, floating=floating)
        else:
            record = CudaGraphs(self._device) if graphs else run_again
            self.program = ReplayedProgram(*parts, record=record, dtype=self._dtype, floating=floating)
        # the schedule's, and what samplers of continuous noise levels visited beyond it
        self._first_timestep = min(0.0, table.timesteps[-1])
        self._last_timestep = max(_schedule_end(key), table.timesteps[0])
        self.training = False

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype between the layers; inputs of any other are converted, outputs have the input's."""
        return self._dtype

    @property
    def add_embedding(self) -> SimpleNamespace:
        """What SDXL's pipelines ask of their unet: the number of features of its added embedding."""
        features = self.model_config.get("projection_class_embeddings_input_dim")
        if features is None:
            raise AttributeError("add_embedding")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=features))

    @property
    def corrects(self) -> bool:
        """Whether calls at calibrated timesteps return the corrected prediction a e + b; True from the start.

        One switch for all threads that call this model.
        """
        return self.program.corrects

    @corrects.setter
    def corrects(self, on: bool) -> None:
        self.program.corrects = bool(on)

    @contextlib.contextmanager
    def correcting(self, on: bool) -> Iterator[None]:
        """Calls return the corrected prediction, or the plain one, until the block ends."""
        before, self.corrects = self.corrects, on
        try:
            yield
        finally:
            self.corrects = before

    def with_table(
        self,
        table: Table,
        recipe: Recipe | None = None,
        correction: Correction | None = None,
        noise: Noise | None = None,
    ) -> IntegerUNet:
        """This model with another table of the same sites, over the same packed weights; neither changes the other."""
        if table.sites != self.table.sites:
            raise ValueError("table must have the sites of this model's table")
        other = copy.copy(self)
        other.table, other.recipe = table, recipe or self.recipe
        other.correction, other.noise, other._warned = correction, noise, False
        other.program = self.program.with_table(retabled(table, floating_sites(self.graph, self.timings)))
        other.corrects = True
        return other

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **conditioning: Any,
    ) -> UNetOutput | tuple[Tensor]:
        """The model's prediction for ``sample`` [B, C, H, W] at one ``timestep``.

        Args:
            sample: floating, on this model's device; the result has its dtype.
            timestep: an int, a float, or a tensor that holds one value (0-d, or 1-d with equal entries).
            encoder_hidden_states, class_labels, conditioning: the captured network's keyword arguments.
            return_dict: False for a plain tuple.

        Raises:
            TypeError: a missing or unknown keyword argument, a tensor of the wrong kind.
            ValueError: a wrong shape, NaN, or a timestep outside the schedule.
        """
        given = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels, **conditioning}
        sample = self._checked_sample(sample)
        value = self._checked_timestep(timestep, len(sample))
        inputs = {"sample": sample.to(self._dtype).contiguous(memory_format=torch.channels_last)}
        inputs["timestep"] = timestep_tensor(value, len(sample)).to(self._device, non_blocking=True)
        inputs.update(self._checked_conditioning(given, len(sample)))
        row = self.table.row(value)
        with torch.autocast(self._device.type, enabled=False):  # which would round what is kept for later calls
            output = self.program.run(inputs, value, row, self._corrected_at(value, row))
        # a copy: an ordinary tensor that the caller may change in place, laid out as other UNets' outputs are
        output = output.to(sample.dtype, copy=True, memory_format=torch.contiguous_format)
        return UNetOutput(output) if return_dict else (output,)

    def _corrected_at(self, timestep: float, row: int) -> bool:
        """Whether corrections were estimated at this very timestep; one warning where they were not."""
        if self.correction is None or self.table.timesteps[row] == timestep:
            return True
        if self.corrects and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model's corrections ({self.correction.method}) are for the calibrated timesteps, not for "
                f"{timestep:g}; they are off where the sampler visits others",
                UserWarning,
                stacklevel=4,
            )
        return False

    def _checked_sample(self, sample: Any) -> Tensor:
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            kind = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
            raise TypeError(f"sample must be a floating-point tensor, got {kind}")
        expected = self.graph.inputs["sample"]
        if sample.dim() != len(expected) or tuple(sample.shape[1:]) != tuple(expected[1:]) or len(sample) < 1:
            raise ValueError(f"sample must be [B, {', '.join(map(str, expected[1:]))}], got {list(sample.shape)}")
        if sample.device.type != self._device.type:
            raise ValueError(f"sample is on {sample.device}, the model on {self._device}")
        if self._check and not bool(torch.isfinite(sample).all()):
            raise ValueError("sample holds NaN or infinity")
        return sample

    def _checked_timestep(self, timestep: Any, batch: int) -> float:
        if isinstance(timestep, Tensor):
            if timestep.dim() > 1 or timestep.numel() not in (1, batch):
                raise ValueError(
                    f"timestep must be a scalar, or 1-d of length 1 or {batch}, got shape {list(timestep.shape)}"
                )
            if timestep.dtype == torch.bool or timestep.is_complex():
                raise TypeError(f"timestep must hold real numbers, got {timestep.dtype}")
            if self._check and not bool((timestep == timestep.reshape(-1)[0]).all()):
                raise ValueError("timestep must hold one value: all samples of a call are at the same step")
            value = self._host.first(timestep)
        elif isinstance(timestep, numbers.Real) and not isinstance(timestep, bool):
            value = float(timestep)
        else:
            raise TypeError(f"timestep must be a number or a tensor, got {type(timestep).__name__}")
        if not self._first_timestep <= value <= self._last_timestep:
            schedule = f"{self._first_timestep:g} to {self._last_timestep:g}"
            raise ValueError(f"timestep must lie in the schedule, {schedule}, got {value:g}")
        return value

    def _checked_conditioning(self, given: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
        flat = {name: value for name, value in flatten_conditioning(given).items() if value is not None}
        wanted = {n: s for n, s in self.graph.inputs.items() if n not in ("sample", "timestep")}
        unknown, missing = sorted(set(flat) - set(wanted)), sorted(set(wanted) - set(flat))
        if unknown or missing:
            raise TypeError(
                f"this model takes the conditioning {sorted(wanted) or 'none'}: "
                + "; ".join([f"unknown {u!r}" for u in unknown] + [f"missing {m!r}" for m in missing])
            )
        for name, shape in wanted.items():
            value = flat[name]
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if tuple(value.shape) != sizes(shape, batch):
                raise ValueError(f"{name} must be {list(sizes(shape, batch))} for this batch, got {list(value.shape)}")
            if value.device.type != self._device.type:
                raise ValueError(f"{name} is on {value.device}, the model on {self._device}")
            flat[name] = self._checked_values(name, value)
        return flat

    def _checked_values(self, name: str, value: Tensor) -> Tensor:
        if self._check:
            self._check_values(name, value)
        if self._device.type != "cpu":
            return self._host.snapshot(name, value)
        return value.float() if value.is_floating_point() else value

    def _check_values(self, name: str, value: Tensor) -> None:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity")
        count = self._categories.get(name)
        if count is not None:
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise TypeError(f"{name} must hold integers, got {value.dtype}")
            if not bool(((value >= 0) & (value < count)).all()):
                raise ValueError(f"{name} must lie in [0, {count - 1}], got {value.tolist()}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artifact: config.json, graph.json, model.safetensors; whole or not at all.

        Raises:
            OSError, ValueError: the folder holds something else, or cannot be written.
        """
        save_artifact(
            Artifact(
                graph=self.graph,
                weights=self.weights,
                constants=self.constants,
                table=self.table,
                recipe=self.recipe,
                key=self.key,
                model_config=self.model_config,
                correction=self.correction,
                noise=self.noise,
            ),
            folder,
        )

    def to(self, *args: Any, **kwargs: Any) -> IntegerUNet:
        """Stay where and as the model is: another device or dtype means loading the artifact with it.

        A CPU model computes in float32 whatever the inputs' dtype, and so passes over a floating ``dtype``.
        """
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        if device is not None and device.type != self._device.type:
            raise ValueError(f"this model runs on {self._device}; load the artifact with device={str(device)!r}")
        if dtype not in (None, self._dtype) and self._device.type != "cpu":
            raise ValueError(f"this model computes in {self._dtype}; load the artifact with dtype={dtype}")
        return self

    def cuda(self, device: int | str | torch.device | None = None) -> IntegerUNet:
        """As ``to("cuda")``."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerUNet:
        """``cpu()``, ``half()``, ``float()`` and others of `nn.Module`: as `to` what they would make of a tensor."""
        moved = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        return self.to(moved.device, moved.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        recipe = self.recipe
        return f"weight_bits={recipe.weight_bits}, rows={len(self.table.timesteps)}, layers={len(self.weights)}"


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    graphs: bool = True,
    check: bool | None = None,
    tune: bool = False,
    tune_batch: int = 2,
) -> IntegerUNet:
    """The model saved in ``folder``; needs neither diffusers nor the class of the original network.

    Args:
        folder: an artifact folder, possibly from a stranger: it is checked, and holds no code.
        device: "cpu" or "cuda".
        backend: a backend's name to insist on.
        dtype, graphs, check, tune, tune_batch: as of `IntegerUNet`.

    Raises:
        ValueError, OSError: the artifact is missing, damaged or of another version; the device is not supported.
    """
    _usable_dtype(dtype, _usable_device(device, backend))
    check_count("tune_batch", tune_batch)
    artifact = load_artifact(folder)
    parts = {name: getattr(artifact, name) for name in _FIELDS}
    options: dict[str, Any] = {"dtype": dtype, "graphs": graphs, "check": check, "tune": tune, "tune_batch": tune_batch}
    try:
        return IntegerUNet(**parts, device=device, backend=backend, **options)
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:  # of a stranger's graph
        if tune:  # which runs kernels, whose failures are their own
            raise
        raise ArtifactError(f"graph.json: a node lacks an argument, or has a wrong one: {error!r:.200}") from error


_FIELDS = ("graph", "weights", "constants", "table", "recipe", "key", "model_config", "correction", "noise")


def _usable_device(device: str | torch.device, backend: str | None = None) -> torch.device:
    try:
        usable = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from error
    if usable.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    reason = ops.refusal(usable, backend)
    if reason is not None:
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}")
    return usable


def _usable_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype must be torch.float32 on a CPU, got {dtype}")
        return torch.float32
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
    return dtype or torch.float16


def _categories(graph: Graph, constants: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of rows of the table that each input of labels, such as class_labels, is looked up in."""
    counts = {}
    for node in graph.nodes:
        if node.op == "embedding":
            table, index = node.args[:2]
            if isinstance(table, Const) and isinstance(index, Ref) and index.name in graph.inputs:
                counts[index.name] = len(constants[table.key])
    return counts


def _schedule_end(key: Mapping[str, Any]) -> float:
    """Largest timestep of the training schedule."""
    scheduler = key.get("scheduler") if isinstance(key, Mapping) else None
    count = scheduler.get("num_train_timesteps") if isinstance(scheduler, Mapping) else None
    return float(count - 1) if isinstance(count, int) and count > 0 else float("inf")
