"""qdiff-engine: integer inference for diffusion UNets. ``import qdiff_engine as qe``; names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

_WHERE = {
    "Recipe": "recipe",
    "Calibration": "calibration.calibration",
    "calibrate": "calibration.calibration",
    "quantize": "quantization",
    "align": "alignment.alignment",
    "AlignmentSettings": "alignment.training",
    "IntegerUNet": "runtime.model",
    "load": "runtime.model",
    "sample": "sampling",
    "bench": "benchmarking",
    "compare": "evaluation",
    "measure_noise": "correction.measurement",
    "correct": "correction.estimation",
    "corrected_scheduler": "correction.schedulers",
    "count_bops": "bops",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from .alignment.alignment import align as align
    from .alignment.training import AlignmentSettings as AlignmentSettings
    from .benchmarking import bench as bench
    from .bops import count_bops as count_bops
    from .calibration.calibration import Calibration as Calibration
    from .calibration.calibration import calibrate as calibrate
    from .correction.estimation import correct as correct
    from .correction.measurement import measure_noise as measure_noise
    from .correction.schedulers import corrected_scheduler as corrected_scheduler
    from .evaluation import compare as compare
    from .quantization import quantize as quantize
    from .recipe import Recipe as Recipe
    from .runtime.model import IntegerUNet as IntegerUNet
    from .runtime.model import load as load
    from .sampling import sample as sample


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
