"""What a recipe may ask of its plan, and the plans that need no measurement."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MODE_BITS = {"A4": 4, "A8": 8, "A16": 16}
FULL_BITS = 8  # the switchable BOPs of a plan are given as a fraction of those at A8

# published splits of PTQD (He et al. 2023): (steps, how many of the noisiest run at A4; the others run at A8)
PRESETS = {
    "imagenet-250": (250, 48),  # steps 249 to 202
    "imagenet-20": (20, 5),  # 19 to 15
    "bedrooms-200": (200, 45),  # 199 to 155
    "churches-200": (200, 54),  # 199 to 146
}
SNR_SHARE = 0.2  # of the rows at A4, where no threshold is given
FORMS = "uniform, snr, snr:THRESHOLD, snr:share=SHARE, budget:FRACTION, budget:FRACTION:MODES, preset:NAME"

_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,17})?(?:e[+-]?[0-9]{1,3})?)"


@dataclass(frozen=True)
class PlanRequest:
    """How the mode of every row is to be found.

    Args:
        kind: "uniform", "snr", "budget" or "preset".
        threshold: of the SNR rule; None where it is solved for ``share``.
        share: of the rows that run at A4 under the SNR rule.
        fraction: of the switchable BOPs at A8 that a budget allows.
        modes: the modes that a budget may use, fewest bits first.
        preset: name of a published split.
    """

    kind: str
    threshold: float | None = None
    share: float = SNR_SHARE
    fraction: float = 1.0
    modes: tuple[str, ...] = tuple(MODE_BITS)
    preset: str = ""

    @property
    def measured(self) -> bool:
        """Whether the plan depends on how the quantised network behaves."""
        return self.kind in ("snr", "budget")


def parse_plan(text: str) -> PlanRequest:
    """The request that ``text`` spells.

    Raises:
        ValueError: none of the forms, or a value outside its range; the message lists what is valid.
    """
    if text in ("uniform", "snr"):
        return PlanRequest(text)
    if found := re.fullmatch(f"snr:{_NUMBER}", text):
        return PlanRequest("snr", threshold=_within(text, float(found[1]), 0, math.inf))
    if found := re.fullmatch(f"snr:share={_NUMBER}", text):
        return PlanRequest("snr", share=_within(text, float(found[1]), 0, 1))
    if found := re.fullmatch(f"budget:{_NUMBER}(?::((?:A4|A8|A16)(?:,(?:A4|A8|A16))*))?", text):
        modes = tuple(m for m in MODE_BITS if m in (found[2] or ",".join(MODE_BITS)).split(","))
        return PlanRequest("budget", fraction=check_reachable(float(found[1]), modes), modes=modes)
    if text.startswith("preset:"):
        name = text.removeprefix("preset:")
        if name not in PRESETS:
            raise ValueError(f"plan preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return PlanRequest("preset", preset=name)
    raise ValueError(f"plan must be one of {FORMS}, or a mode (A4, A8, A16) for every row; got {text!r}")


def _within(text: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high or math.isinf(value):
        raise ValueError(f"plan {text!r}: the number must lie in [{low:g}, {high:g}]")
    return value


def check_reachable(fraction: float, modes: tuple[str, ...]) -> float:
    """``fraction``, if some plan over ``modes`` stays within it; above the dearest plan there is nothing to choose."""
    low, high = (MODE_BITS[modes[i]] / FULL_BITS for i in (0, -1))
    if not low <= fraction <= high:
        raise ValueError(
            f"plan budget:{fraction:g} cannot be reached: over {', '.join(modes)} the switchable BOPs are "
            f"{low:g} to {high:g} of those at A8"
        )
    return fraction


def preset_modes(name: str, rows: int) -> tuple[str, ...]:
    """The published split ``name``: A4 for its share of ``rows``, noisiest first, and A8 below.

    Exactly the published steps where ``rows`` is the published count; the same share, rounded, for another.
    """
    steps, count = PRESETS[name]
    noisy = round(rows * count / steps)
    return ("A4",) * noisy + ("A8",) * (rows - noisy)


def expected_modes(request: PlanRequest, uniform: str) -> tuple[str, ...]:
    """Modes in the proportions that ``request`` will give, for counting BOPs before anything is measured.

    Raises:
        ValueError: the proportions depend on a measurement (an SNR threshold).
    """
    if request.kind == "uniform":
        return (uniform,)
    if request.kind == "preset":
        return preset_modes(request.preset, PRESETS[request.preset][0])
    parts = 1000
    if request.kind == "snr":
        if request.threshold is not None:
            raise ValueError("plan snr:THRESHOLD: how many rows run at A4 is only known after calibration")
        noisy = round(parts * request.share)
        return ("A4",) * noisy + ("A8",) * (parts - noisy)
    bits = request.fraction * FULL_BITS
    low = max((m for m in request.modes if MODE_BITS[m] <= bits), key=MODE_BITS.__getitem__)
    high = min((m for m in request.modes if MODE_BITS[m] >= bits), key=MODE_BITS.__getitem__)
    gap = MODE_BITS[high] - MODE_BITS[low]
    above = round(parts * (bits - MODE_BITS[low]) / gap) if gap else 0
    return (high,) * above + (low,) * (parts - above)


def switchable_fraction(modes: tuple[str, ...]) -> float:
    """mean over rows of bits / 8: the BOPs of the layers that a plan switches, over the same at A8."""
    return sum(MODE_BITS[mode] for mode in modes) / (FULL_BITS * len(modes))
