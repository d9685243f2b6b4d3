"""What may be asked for as the (x_t, t) of the float trajectories that a stage learns on."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = re.compile(r"(every)|(uniform|gaussian|density):([1-9][0-9]{0,8})(?::([0-9.]+),([0-9.]+))?")
_GAUSSIAN = (0.4, 0.4)  # of the schedule, as PTQ4DM has it


@dataclass(frozen=True)
class Selection:
    """``count`` pairs by ``kind``; mean and deviation are those of "gaussian", as fractions of the schedule."""

    kind: str
    count: int = 0
    mean: float = _GAUSSIAN[0]
    deviation: float = _GAUSSIAN[1]


def parse_selection(text: str, name: str = "pairs") -> Selection:
    """ "every", "uniform:N", "gaussian:N", "gaussian:N:MEAN,DEVIATION" or "density:N".

    Raises:
        ValueError: none of these forms; the message begins with ``name``.
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    bounds = None if found is None or found[4] is None else (found[4], found[5])
    if found is None or (bounds is not None and found[2] != "gaussian"):
        raise ValueError(
            f"{name} must be 'every', 'uniform:N', 'gaussian:N', 'gaussian:N:MEAN,DEVIATION' or 'density:N', "
            f"got {text!r:.50}"
        )
    if found[1] is not None:
        return Selection("every")
    try:
        mean, deviation = map(float, bounds or _GAUSSIAN)
    except ValueError:
        raise ValueError(f"{name} must give numbers as MEAN,DEVIATION, got {text!r:.50}") from None
    if not (mean <= 1 and 0 < deviation <= 10):
        raise ValueError(f"{name} must have MEAN in [0, 1] and DEVIATION in (0, 10], got {text!r:.50}")
    return Selection(found[2], int(found[3]), mean, deviation)
