"""Which (x_t, t) of the float trajectories a stage learns on: all, drawn by timestep, or the most representative.

Every pair is one that the network received, with its own timestep; at equal count, every selection costs the same.

Sources: Shang et al., PTQ4DM (CVPR 2023), timesteps drawn from a normal distribution; Ye et al., PQD (2025),
samples that are typical and diverse.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pair_requests import Selection
from .calibration import Calibration

_GRID, _ROUNDS = 8, 20


def selected_pairs(calibration: Calibration, selection: Selection, seed: int = 0) -> list[tuple[int, int]]:
    """(step, sample) of every selected pair, steps first.

    "uniform" draws pairs without replacement, "gaussian" with the weight exp(-(t/T - mean)^2 / 2 deviation^2) of their
    timestep. "density" clusters all pairs, the timestep among their features, and takes of every cluster the pair
    nearest to its centre: one of each kind is diverse, the middle one typical.
    """
    trajectory = calibration.trajectory
    steps, samples = len(trajectory.timesteps), len(trajectory.samples[0])
    if selection.kind == "every":
        return [(step, sample) for step in range(steps) for sample in range(samples)]
    if selection.count > steps * samples:
        raise ValueError(f"pairs must be at most the calibration's {steps * samples}, got {selection.count}")
    end = float(calibration.key["scheduler"].get("num_train_timesteps") or max(trajectory.timesteps) + 1)
    places = torch.tensor(trajectory.timesteps, dtype=torch.float64) / end
    generator = torch.Generator().manual_seed(seed)
    if selection.kind == "density":
        chosen = representatives(pair_features(trajectory.samples, places), selection.count, generator)
    else:
        weights = torch.ones_like(places)
        if selection.kind == "gaussian":
            weights = torch.exp(-((places - selection.mean) ** 2) / (2 * selection.deviation**2)).clamp(min=1e-12)
        chosen = torch.multinomial(weights.repeat_interleave(samples), selection.count, generator=generator)
    return [divmod(pair, samples) for pair in sorted(chosen.tolist())]


def pair_features(latents: tuple[Tensor, ...], places: Tensor) -> Tensor:
    """float64 [S n, F]: latents [n, C, H, W] of every step on a coarse grid, standardised as a whole, and t/T.

    The timestep weighs as much as all of the latents' features together.
    """
    pooled = torch.cat([F.adaptive_avg_pool2d(x.double(), min(_GRID, *x.shape[2:])).flatten(1) for x in latents])
    pooled = (pooled - pooled.mean(0)) / pooled.std().clamp(min=1e-12)
    when = places.repeat_interleave(len(latents[0]))[:, None]
    when = (when - when.mean()) / when.std(correction=0).clamp(min=1e-12)
    return torch.cat([pooled / math.sqrt(pooled.shape[1]), when], 1)


def representatives(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] of the points nearest to the centres of ``count`` clusters of ``features`` [N, F].

    Lloyd's k-means from k-means++ seeds. A library would bring a dependency for these few lines, and a result that
    changes with its version, where the same calibration must give the same bytes.
    """
    centres = features[_spread(features, count, generator)]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(features, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    distances = torch.cdist(centres, features)
    chosen: list[int] = []
    for cluster in distances:  # two centres may have one nearest point: the later one takes its next
        if chosen:
            cluster[chosen] = torch.inf
        chosen.append(int(cluster.argmin()))
    return torch.tensor(chosen)


def _spread(features: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Greedy k-means++: of a few points drawn by their squared distance to the seeds, the one that leaves least."""
    tries = 2 + int(math.log(count))
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distances = (features - features[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        weights = distances.clone()
        weights[chosen] = 0
        if float(weights.sum()) <= 0:  # equal points: any that is left
            weights = torch.ones_like(weights)
            weights[chosen] = 0
        drawn = torch.multinomial(weights, tries, replacement=True, generator=generator)
        left = torch.minimum(distances, torch.cdist(features[drawn], features).square())
        best = int(left.sum(1).argmin())
        chosen.append(int(drawn[best]))
        distances = left[best]
    return chosen
