"""Options that commands share, and what they stand for: a device, a scheduler, conditioning, a plan."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from .output import Output

Function = TypeVar("Function", bound=Callable[..., Any])

_MAX_TRAIN_TIMESTEPS = 100_000
_UNCONDITIONAL = "unconditional"


class Command(click.Command):
    """A command with ``--json`` and ``--debug``; with ``--json``, whatever else is printed goes to standard error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        flag: dict[str, Any] = {"is_flag": True, "expose_value": False, "is_eager": True, "callback": _set_flag}
        self.params += [
            click.Option(["--json"], help="One JSON object on standard output, nothing else there.", **flag),
            click.Option(["--debug"], help="Show the traceback of an error.", **flag),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        import sys

        elsewhere = contextlib.redirect_stdout(sys.stderr) if ctx.obj.json else contextlib.nullcontext()
        with elsewhere:
            return super().invoke(ctx)


def _set_flag(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        setattr(ctx.obj, str(parameter.name), True)


def count_option(name: str, default: int | None, text: str, *, least: int = 1) -> Callable[[Function], Function]:
    """An integer option of at least ``least``."""
    return click.option(
        name, type=click.IntRange(min=least), default=default, show_default=default is not None, help=text
    )


def sampling_options(function: Function) -> Function:
    """--eta, --guidance, --conditioning, --batch."""
    for option in (
        count_option("--batch", 16, "Samples per call of the network."),
        click.option(
            "--conditioning",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Keyword arguments of the network, a safetensors file: a key per argument (nested by dots), the first "
            "axis cycled over the samples; keys under 'unconditional.' are those of the unconditional branch.",
        ),
        click.option("--guidance", type=float, help="Scale of classifier-free guidance."),
        click.option("--eta", type=click.FloatRange(0, 1), help="Noise of the DDIM sampler, 0 to 1."),
    ):
        function = option(function)
    return function


def correction_option(function: Function) -> Function:
    """--correction on|off, as a bool."""
    return click.option(
        "--correction",
        type=click.Choice(["on", "off"]),
        default="on",
        show_default=True,
        callback=lambda ctx, parameter, value: value == "on",
        help="Apply the corrections that ART holds, where they fit the sampler.",
    )(function)


sampler_option = click.option(
    "--sampler",
    type=click.Choice(["artifact", "ddim", "ddpm"]),
    default="artifact",
    show_default=True,
    help="'artifact' is the sampler that ART was calibrated with.",
)

features_option = click.option(
    "--features",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Feature extractor of the Fréchet distance: auto (the digit classifier for the bundled model), digits, none, "
    "or package.module:name, a torch module or a function that returns one; images [n, C, H, W] in [-1, 1] go in, "
    "features [n, F] or (features, logits) come out.",
)


def read_features(name: str) -> Any:
    """``--features`` as `evaluation.compare` takes it; of a dotted name, the object that Python imports.

    Raises:
        ValueError: no such module or name, or something that is no extractor.
    """
    if name in ("auto", "digits"):
        return name
    if name == "none":
        return None
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"--features {name}: name auto, digits, none or package.module:name")
    import importlib

    from torch import nn

    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--features {name}: {error}; the module must be importable (see PYTHONPATH)") from error
    try:
        made = found if isinstance(found, nn.Module) or not callable(found) else found()
    except TypeError as error:
        raise ValueError(f"--features {name}: must be a function without arguments ({error})") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"--features {name}: must be or return a torch module, got {type(made).__name__}")
    return made.eval()


def machine_options(function: Function) -> Function:
    """--device, --threads."""
    function = count_option("--threads", None, "CPU threads; torch's default otherwise.")(function)
    return click.option(
        "--device", default="cpu", show_default=True, help="Where the network runs, and in calibrate what learns."
    )(function)


def use_machine(device: str, threads: int | None) -> Any:
    """Set the number of threads; the torch device called ``device``, refused where the engine has no kernels for it."""
    import torch

    from .. import ops

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must be 'cpu' or 'cuda', got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be 'cpu' or 'cuda', got {device!r}")
    if target.type == "cuda":
        kernels = {name: status for name, status in ops.backends().items() if name in ("triton", "cuda")}
        if torch.cuda.device_count() <= (target.index or 0):
            raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu")
        if not any(status["available"] for status in kernels.values()):
            reasons = "; ".join(status["reason"] for status in kernels.values())
            raise ValueError(f"--device {device}: {reasons}; use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    return target


def read_conditioning(path: Path | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(conditioning, unconditional) of a safetensors file; None for what it does not hold."""
    if path is None:
        return None, None
    import safetensors
    import safetensors.torch

    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; --conditioning names a safetensors file") from error
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a safetensors file ({error}); write it with safetensors.torch.save_file"
        ) from None
    nested: dict[str, Any] = {}
    for key, value in sorted(tensors.items()):
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path}: key {key!r} goes below {parent!r}, which is a tensor; rename one of them")
        place[last] = value
    unconditional = nested.pop(_UNCONDITIONAL, None)
    return nested or None, unconditional


def guidance_arguments(path: Path | None, guidance: float | None) -> dict[str, Any]:
    """The keyword arguments ``conditioning``, ``unconditional`` and ``guidance_scale`` of the sampling functions."""
    conditioning, unconditional = read_conditioning(path)
    if guidance is not None and (conditioning is None or unconditional is None):
        raise ValueError(
            f"--guidance {guidance:g} needs --conditioning FILE.safetensors that holds both NAME and unconditional.NAME"
        )
    if guidance is None:
        unconditional = None
    return {"guidance_scale": guidance, "conditioning": conditioning, "unconditional": unconditional}


def check_conditioning(model: Any, given: Mapping[str, Any] | None, source: str) -> None:
    """Refuse to start without the conditioning that the captured network of ``source`` takes."""
    from ..graph.interpret import flatten_conditioning

    missing = sorted(set(model.graph.inputs) - {"sample", "timestep"} - set(flatten_conditioning(given)))
    if missing:
        raise ValueError(f"{source} takes the conditioning {', '.join(missing)}; give it in --conditioning FILE")


def make_sampler(sampler: str, scheduler: Any, source: str) -> Any:
    """The scheduler that ``--sampler`` names, from the one that ``source`` came with."""
    if scheduler is None:
        raise ValueError(f"{source} has no scheduler; add scheduler/scheduler_config.json to the folder")
    if sampler == "ddim":
        from ..models import ddim

        return ddim(scheduler)
    if sampler == "ddpm":
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        config = {"clip_sample": False, **dict(scheduler.config)}
        if "beta_schedule" not in config:
            raise ValueError(f"{type(scheduler).__name__} has no beta schedule, so DDPM cannot replace it")
        return scheduler_from(DDPMScheduler, config)
    return scheduler


def takes_eta(scheduler: Any) -> bool:
    """Whether the sampler's steps have an eta, as DDIM's."""
    return "eta" in inspect.signature(scheduler.step).parameters


def check_eta(eta: float | None, scheduler: Any) -> float:
    """``--eta``, 0 when it is not given; refused before any work where the sampler takes none."""
    if eta and not takes_eta(scheduler):
        raise ValueError(f"--eta {eta:g}: {type(scheduler).__name__} takes no eta; use --sampler ddim")
    return eta or 0.0


def scheduler_of(key: Mapping[str, Any]) -> Any:
    """The scheduler an artifact was calibrated with, rebuilt from its key: one of diffusers' own classes only.

    Raises:
        ValueError: the key names no such class, or a configuration that does not fit it.
    """
    config = dict(key.get("scheduler") or {})
    name = config.pop("class", None)
    try:
        import diffusers.schedulers as schedulers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError as error:
        raise OSError(f"diffusers cannot be imported ({error}); pip install diffusers") from error
    known = isinstance(name, str) and name in dir(schedulers) and not name.startswith("_")
    found = getattr(schedulers, name) if known else None
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin):
        raise ValueError(
            f"config.json: key.scheduler.class is {name!r}, which is no scheduler of the installed diffusers; "
            "upgrade diffusers"
        )
    count = config.get("num_train_timesteps", 1)
    if not isinstance(count, int) or not 1 <= count <= _MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"config.json: key.scheduler.num_train_timesteps must be 1 to {_MAX_TRAIN_TIMESTEPS}")
    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    return scheduler_from(found, {k: float(v) if v in ("inf", "-inf") else v for k, v in settings.items()})


def scheduler_from(kind: Any, config: dict[str, Any]) -> Any:
    """A diffusers scheduler of class ``kind``; diffusers' remarks on unused keys are expected here and not shown."""
    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return kind.from_config(config)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"no {kind.__name__} from this scheduler configuration: {error}") from error
    finally:
        logger.setLevel(level)


def read_plan(plan: str, scheduler: Any, steps: int) -> str | tuple[str, ...]:
    """``--plan``: a name or request, or the modes in a JSON file (a list of modes or of {timestep, mode}), by row."""
    if plan.split(":")[0] in ("uniform", "snr", "budget", "preset"):
        return plan  # the recipe checks it
    path = Path(plan)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file; --plan is uniform, snr, budget:FRACTION, preset:NAME or a JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON ({error}); a plan is a list of modes such as ["A16", "A8"]') from error
    from ..sampling import prepared

    timesteps = sorted({float(t) for t in prepared(scheduler, steps).timesteps}, reverse=True)
    if not isinstance(rows, list) or len(rows) != len(timesteps):
        found = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"{path}: a plan for {steps} steps is a list of {len(timesteps)} rows, got {found}")
    modes = []
    for i, (row, timestep) in enumerate(zip(rows, timesteps, strict=True)):
        if isinstance(row, dict):
            if set(row) != {"timestep", "mode"} or row["timestep"] != timestep:
                raise ValueError(f"{path}: row {i} must hold a mode and the timestep {timestep:g}, got {row}")
            row = row["mode"]
        if not isinstance(row, str):
            raise ValueError(f"{path}: row {i} must name A4, A8 or A16, got {row!r}")
        modes.append(row)
    return tuple(modes)


pass_output = click.make_pass_decorator(Output)
