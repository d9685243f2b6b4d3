"""The plan of least final error under a BOPs budget.

Final error: mean squared difference between the final images of the integer model and of the float one, from the same
noise. A row's contribution at a mode is the final error when that row alone runs at that mode, and a carrier takes it
through the rest of the trajectory. Assumption: contributions of rows add up. It is exact where errors of different rows
are uncorrelated and the trajectory carries them linearly, and rough where images change altogether. Under it the plan
is the best of all whose modes change between blocks of rows only; up to 25 rows, each is a block of its own. Two
carriers are tried: the float network, which ranks the rows cleanly where few run at low precision, and the uniform plan
below the budget, which knows the large errors of a plan where most do. The plan of smaller error, measured on further
samples, wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..plan_requests import FULL_BITS, MODE_BITS
from .trial import Planned, Sampler, by_bits, final_errors

MAX_BLOCKS = 25  # neighbouring rows beyond that are switched together: the cost is quadratic
_CARRIER = "carrier"
_UNIT = 4  # bits; every mode has a multiple of it

Progress = Callable[[], None]


@dataclass(frozen=True)
class Effects:
    """What running one block of rows on integers does to the final image.

    Args:
        modes: fewest bits first; ``sizes``: rows of each block, noisiest first.
        errors: float64 [B, M, n], the final error of every image with block b at mode m and the carrier elsewhere.
    """

    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    errors: Tensor

    def costs(self) -> Tensor:
        """float64 [B, M]: mean contribution to the final error, never larger for more bits.

        Where fewer bits seem better, that is noise of a few samples: a mode is as good as the best one below it.
        """
        return self.errors.mean(2).cummin(1).values


def measure_effects(
    models: Mapping[str, Any],
    row: Callable[[float], int],
    rows: int,
    carrier: Any,
    sampler: Sampler,
    reference: Tensor,
    on_trial: Progress | None = None,
) -> Effects:
    """`Effects` of every block.

    Costs about blocks x rows / 2 evaluations of the carrier per mode: steps before the block are replayed.

    Args:
        models: one per mode; ``row``: of a timestep; ``rows``: how many there are.
        carrier: the network at all other rows: the float one, or one of ``models``.
        reference: the float network's final images for the sampler's noise.
        on_trial: called after each of the blocks x modes trials.
    """
    modes, sizes = tuple(by_bits(models)), block_sizes(rows)
    images, path = sampler.path(carrier)
    contestants = {**models, _CARRIER: carrier}
    visited = [row(step.timestep) for step in path]
    errors = final_errors(images, reference).expand(len(sizes), len(modes), -1).clone()
    start = 0
    for b, size in enumerate(sizes):
        block = range(start, start + size)
        start += size
        first = next((i for i, r in enumerate(visited) if r in block), None)
        for m, mode in enumerate(modes):
            if first is not None and models[mode] is not carrier:  # a row that is never visited has no effect
                planned = Planned(contestants, row, [mode if r in block else _CARRIER for r in range(rows)])
                recorded = {i: path[i].prediction for i in range(first)}
                errors[b, m] = final_errors(sampler.run(planned, recorded), reference)
            if on_trial is not None:
                on_trial()
    return Effects(modes, sizes, errors)


def block_sizes(rows: int) -> tuple[int, ...]:
    """Rows of each block: as equal as can be, at most `MAX_BLOCKS` blocks."""
    count = min(rows, MAX_BLOCKS)
    return tuple(rows * (b + 1) // count - rows * b // count for b in range(count))


def best_assignment(costs: Tensor, sizes: Sequence[int], modes: Sequence[str], fraction: float) -> tuple[int, ...]:
    """argmin over m of sum_b costs[b, m_b], subject to sum_b sizes_b bits(m_b) <= fraction x 8 x rows: exact.

    Dynamic programming over blocks and units of 4 bits (the multiple-choice knapsack). Of equal costs, more bits win.

    Args:
        costs: float64 [B, M].

    Raises:
        ValueError: no assignment fits the budget.
    """
    weights = [[size * MODE_BITS[mode] // _UNIT for mode in modes] for size in sizes]
    budget = math.floor(fraction * FULL_BITS * sum(sizes) / _UNIT + 1e-9)
    best = [0.0] + [math.inf] * budget  # least cost that spends exactly so many units
    choices: list[list[int]] = []
    for b, weight in enumerate(weights):
        reached, chosen = [math.inf] * (budget + 1), [-1] * (budget + 1)
        for m, spent in enumerate(weight):
            cost = float(costs[b, m])
            for total in range(spent, budget + 1):
                value = best[total - spent] + cost
                if value < reached[total] or (value == reached[total] and value < math.inf):
                    reached[total], chosen[total] = value, m
        best = reached
        choices.append(chosen)
    least = min(best)
    if math.isinf(least):
        raise ValueError(f"no plan over {', '.join(modes)} spends at most {fraction:g} of the switchable BOPs at A8")
    total = max(i for i, value in enumerate(best) if value == least)
    assignment = []
    for weight, chosen in zip(reversed(weights), reversed(choices), strict=True):
        assignment.append(chosen[total])
        total -= weight[chosen[total]]
    return tuple(reversed(assignment))


def expanded(effects: Effects, assignment: Sequence[int]) -> tuple[str, ...]:
    """The mode of every row, from the mode index of every block."""
    pairs = zip(effects.sizes, assignment, strict=True)
    return tuple(effects.modes[m] for size, m in pairs for _ in range(size))
