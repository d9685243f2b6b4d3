"""MODEL of the command line: the bundled demo network or a diffusers folder, as a float32 module and its scheduler."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEMO_NAME = "demo"
DEMO_FOLDER = Path(__file__).resolve().parent / "data" / "mnist32-ddpm"
DEMO_HASH = "bed900ead817edc86ab31593a6de9e2b8ea64a2381444285ec89c5807fb4f127"  # of its float32 parameters
DEMO_PARAMETERS = 4_023_233
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
PIPELINE_CONFIG = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"

# what a foreign constructor or loader raises on a configuration that does not fit it
_FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class LoadedModel:
    """A UNet in eval mode and float32, the scheduler saved with it (None if there was none), and a short name."""

    unet: nn.Module
    scheduler: Any
    name: str


def load_model(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """The network that ``source`` names, from safetensors weights only; the global random state is left as it was.

    Args:
        source: "demo" (the bundled model) or a diffusers folder: a pipeline's (`model_index.json`), one with
            `unet/` and `scheduler/`, or a flat one (`config.json` with the weights, `scheduler_config.json` if any).
        device: where the UNet's parameters go.

    Raises:
        OSError: a file or folder that is missing or cannot be read.
        ValueError: a file whose content is wrong; the message names the file and the mend.
    """
    target = usable_device(device)
    demo = isinstance(source, str) and source == DEMO_NAME
    folder = DEMO_FOLDER if demo else Path(source).expanduser()
    unet_folder, scheduler_folder = _find_parts(folder)
    scheduler = _load_scheduler(scheduler_folder) if scheduler_folder is not None else None
    unet = _load_unet(unet_folder).to(target)
    return LoadedModel(unet, scheduler, DEMO_NAME if demo else folder.resolve().name)


def demo_model(device: str | torch.device = "cpu") -> LoadedModel:
    """The bundled model: a 4.0M-parameter DDPM UNet of MNIST digits, 1x32x32 in [-1, 1]."""
    return load_model(DEMO_NAME, device)


def ddim(scheduler: Any) -> Any:
    """A diffusers `DDIMScheduler` with the noise schedule, prediction type and clipping of ``scheduler``.

    Raises:
        TypeError: ``scheduler`` is not a diffusers scheduler.
        ValueError: it has no discrete beta schedule (flow matching, EDM), so that DDIM cannot serve it.
    """
    _require_diffusers()
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    if not issubclass(type(scheduler), SchedulerMixin):
        raise TypeError(f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}")
    config = dict(scheduler.config)
    if "beta_schedule" not in config:
        raise ValueError(f"{type(scheduler).__name__} has no beta schedule, so DDIM cannot replace it; use it as it is")
    # a scheduler that knows no clipping does not clip, whereas DDIM's default would
    config.setdefault("clip_sample", False)
    with _quiet_diffusers():
        try:
            return DDIMScheduler.from_config(config)
        except _FOREIGN_ERRORS as error:
            raise ValueError(
                f"no DDIM scheduler from the configuration of {type(scheduler).__name__}: {_line(error)}"
            ) from error


def usable_device(device: str | torch.device) -> torch.device:
    """``device`` as torch knows it, refused with a ValueError where this machine has none."""
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(target)!r}: torch sees {torch.cuda.device_count()} CUDA GPUs; use 'cpu'")
    return target


def _find_parts(folder: Path) -> tuple[Path, Path | None]:
    """The folder of the UNet and that of the scheduler (None if there is none)."""
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder; MODEL is 'demo' or a local diffusers folder (get one with 'hf download')"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder; MODEL is the diffusers folder that holds this file")
    pipeline = _read_json(folder / PIPELINE_CONFIG) if (folder / PIPELINE_CONFIG).exists() else None
    if (folder / "unet").is_dir():
        scheduler = folder / "scheduler"
        return folder / "unet", scheduler if scheduler.exists() or "scheduler" in (pipeline or {}) else None
    if (folder / CONFIG).exists():
        return folder, folder if (folder / SCHEDULER_CONFIG).exists() else None
    if pipeline is not None and "unet" not in pipeline:
        parts = ", ".join(name for name in pipeline if not name.startswith("_")) or "nothing"
        raise ValueError(f"{folder / PIPELINE_CONFIG}: the pipeline has no 'unet' (it has {parts}); only UNets run")
    if pipeline is not None:
        raise FileNotFoundError(f"{folder / 'unet'}: missing, though {PIPELINE_CONFIG} names it; copy the whole folder")
    raise FileNotFoundError(
        f"{folder}: not a diffusers model; it needs {PIPELINE_CONFIG}, a unet folder or {CONFIG}"
        " (write one with save_pretrained)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; save the model again with save_pretrained") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({_line(error)}); copy the file again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(values).__name__}; copy the file again")
    return values


def _load_scheduler(folder: Path) -> Any:
    """The diffusers scheduler configured in ``folder``."""
    path = folder / SCHEDULER_CONFIG
    config = _read_json(path)
    _require_diffusers()
    import diffusers.schedulers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    scheduler_class = _named_class(path, config, diffusers.schedulers, SchedulerMixin, "schedulers")
    with _quiet_diffusers():
        try:
            return scheduler_class.from_config(config)
        except _FOREIGN_ERRORS as error:
            raise ValueError(f"{path}: does not configure a {config['_class_name']}: {_line(error)}") from error


def _load_unet(folder: Path) -> nn.Module:
    """The diffusers UNet saved in ``folder``, with every weight read from safetensors."""
    path = folder / CONFIG
    config = _read_json(path)
    _require_diffusers()
    import diffusers.models.unets
    from diffusers.models.modeling_utils import ModelMixin

    unet_class = _named_class(path, config, diffusers.models.unets, ModelMixin, "UNets")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path}: the model is already quantised (quantization_config); give the original one")
    variant, weights = _weight_files(folder)
    for file in weights:
        _check_safetensors(file)
    with _quiet_diffusers(), torch.random.fork_rng(devices=[]):
        try:
            unet, info = unet_class.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except _FOREIGN_ERRORS as error:
            raise ValueError(f"{folder}: {CONFIG} and the weights do not make a UNet: {_line(error)}") from error
    _check_loaded(folder, unet, info)
    return unet.float().eval()


def _named_class(path: Path, config: dict[str, Any], module: Any, base: type, kind: str) -> Any:
    """The class that ``config`` names, if it is one of ``module``'s public subclasses of ``base``."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{path}: no '_class_name', so not written by diffusers; save the model with save_pretrained")
    found = getattr(module, name, None) if name in dir(module) and not name.startswith("_") else None
    # diffusers puts a placeholder where a class needs a package that is missing; it is no subclass either
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(
            f"{path}: '_class_name' is {name!r}, which is none of the {kind} of the installed diffusers; "
            "give a folder with one of those, or upgrade diffusers"
        )
    return found


def _weight_files(folder: Path) -> tuple[str | None, list[Path]]:
    """diffusers' variant name and the safetensors files of the weights, full precision before half."""
    for variant in (None, "fp16"):
        middle = f".{variant}" if variant else ""
        index = folder / f"{WEIGHTS}.safetensors.index{middle}.json"
        if index.exists():
            return variant, _shards(index)
        single = folder / f"{WEIGHTS}{middle}.safetensors"
        if single.exists():
            return variant, [single]
    pickled = sorted(folder.glob(f"{WEIGHTS}*.bin"))
    if pickled:
        raise FileNotFoundError(
            f"{pickled[0]}: pickled weights are not read, because they can run code; "
            "convert them with save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder / WEIGHTS}.safetensors: no such file; copy the weights there")


def _shards(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names, all beside it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: 'weight_map' must map weights to files; copy the file again")
    names = {str(name) for name in weight_map.values()}
    outside = sorted(name for name in names if Path(name).name != name or "\\" in name)
    if outside:
        raise ValueError(f"{index}: 'weight_map' names {outside[0]!r}, which is not a file beside it")
    return [index.parent / name for name in sorted(names)]


def _check_safetensors(path: Path) -> None:
    """Refuse a file whose safetensors header is wrong or whose length is not the one the header states."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the weights there")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or not safetensors ({_line(error)}); "
            "copy the file again (for a git-lfs pointer: git lfs pull)"
        ) from error


def _check_loaded(folder: Path, unet: nn.Module, info: dict[str, Any]) -> None:
    """Refuse weights that do not cover the network exactly, or that are not finite."""
    for key, trouble in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "hold unknown"),
        ("mismatched_keys", "have the wrong shape for"),
    ):
        names = sorted(str(name) for name in info.get(key, ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{folder}: the weights {trouble} {names[0]!r}{more}; {CONFIG} belongs to another network")
    for name, value in unet.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{folder}: weight {name!r} holds NaN or infinity; export the model again")


def _require_diffusers() -> None:
    """Say in one line what to install where diffusers is missing."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise OSError(f"diffusers cannot be imported ({_line(error)}); pip install diffusers") from error


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers' own log, since every trouble it would tell is raised here as an error."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _line(error: BaseException) -> str:
    """An error's message on one line, shortened; the error's type where it has none."""
    return textwrap.shorten(str(error), width=240, placeholder=" ...") or type(error).__name__
