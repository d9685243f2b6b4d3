"""Calibration pairs: what may be asked for, draws by timestep, and representatives that are typical and diverse."""

from __future__ import annotations

import collections
import dataclasses

import networks
import pytest
import torch
from networks import SAMPLES, STEPS, normal

import qdiff_engine as qe
from qdiff_engine.alignment.alignment import float_path
from qdiff_engine.alignment.training import AlignmentSettings, batches
from qdiff_engine.calibration.calibration import Calibration, Trajectory
from qdiff_engine.calibration.selection import pair_features, representatives, selected_pairs
from qdiff_engine.pair_requests import Selection, parse_selection
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.reconstruction.learning_set import learning_set
from qdiff_engine.sampling import Guidance


def long_calibration(steps: int = 50, samples: int = 40) -> Calibration:
    """Statistics of nothing, with trajectories of noise: selections look at those alone."""
    timesteps = tuple(float(t) for t in torch.linspace(980, 0, steps).long().tolist())
    latents = tuple(normal(samples, 1, 4, 4, seed=i) for i in range(steps))
    nothing = torch.zeros(0)
    key = {"scheduler": {"num_train_timesteps": 1000}}
    trajectory = Trajectory(timesteps, latents)
    capture = networks.calibration("guided").capture
    return Calibration(capture, timesteps, (), nothing, nothing, {}, trajectory, key, (1, 4, 4), None, Guidance())


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("every", Selection("every")),
        ("uniform:8", Selection("uniform", 8)),
        ("gaussian:8", Selection("gaussian", 8, 0.4, 0.4)),
        ("gaussian:8:0.25,0.1", Selection("gaussian", 8, 0.25, 0.1)),
        ("density:12", Selection("density", 12)),
    ],
)
def test_forms(text: str, selection: Selection) -> None:
    assert parse_selection(text) == selection


@pytest.mark.parametrize(
    "text",
    ["all", "uniform", "uniform:0", "density:4:0.1,0.2", "gaussian:4:0.1", "gaussian:4:2,1", "gaussian:4:.,.", 3],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pairs must"):
        parse_selection(text)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "density"])
def test_pairs_are_distinct_and_repeatable(kind: str) -> None:
    calibration = long_calibration()
    pairs = selected_pairs(calibration, Selection(kind, 300), seed=1)
    assert len(set(pairs)) == 300 and pairs == sorted(pairs)
    assert all(0 <= step < 50 and 0 <= sample < 40 for step, sample in pairs)
    assert pairs == selected_pairs(calibration, Selection(kind, 300), seed=1)
    assert pairs != selected_pairs(calibration, Selection(kind, 300), seed=2)
    with pytest.raises(ValueError, match="at most the calibration's 2000, got 2001"):
        selected_pairs(calibration, Selection(kind, 2001))
    assert len(selected_pairs(calibration, Selection("every"))) == 2000


def test_gaussian_prefers_its_timesteps() -> None:
    """Shares of the steps follow the density of t / T; few pairs are drawn, so that none runs out."""
    calibration = long_calibration(samples=400)
    places = torch.tensor(calibration.trajectory.timesteps, dtype=torch.float64) / 1000
    pairs = selected_pairs(calibration, Selection("gaussian", 2000, 0.4, 0.1))
    drawn = torch.tensor([places[step] for step, _ in pairs])
    assert float(drawn.mean()) == pytest.approx(0.4, abs=0.01) and float(drawn.std()) == pytest.approx(0.1, abs=0.01)
    uniform = selected_pairs(calibration, Selection("uniform", 2000))
    drawn = torch.tensor([places[step] for step, _ in uniform])
    assert float(drawn.mean()) == pytest.approx(float(places.mean()), abs=0.02)


def test_representatives_are_typical_and_diverse() -> None:
    """Of well separated clusters of unequal size, one each, and its middle; against brute force."""
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]], dtype=torch.float64)
    sizes = [40, 5, 12, 3]
    label = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    features = centres[label] + 0.3 * normal(60, 2).double()
    chosen = representatives(features, 4, torch.Generator().manual_seed(0)).tolist()
    assert sorted(int(label[i]) for i in chosen) == [0, 1, 2, 3]
    for i in chosen:
        members = (label == label[i]).nonzero().flatten()
        middle = features[members].mean(0)
        assert i == int(members[(features[members] - middle).norm(dim=1).argmin()])


def test_representatives_of_equal_points_are_distinct() -> None:
    chosen = representatives(torch.zeros(6, 3, dtype=torch.float64), 6, torch.Generator().manual_seed(0))
    assert sorted(chosen.tolist()) == list(range(6))


def test_features_weigh_the_timestep_like_the_latents() -> None:
    latents = tuple(normal(30, 2, 16, 16, seed=i) for i in range(5))
    features = pair_features(latents, torch.linspace(0.9, 0.1, 5, dtype=torch.float64))
    assert features.shape == (150, 2 * 64 + 1)
    assert float(features[:, -1].var(correction=0)) == pytest.approx(1)
    assert float(features[:, :-1].var(0).sum()) == pytest.approx(1, rel=0.02)
    assert len(set(features[:30, -1].tolist())) == 1


def test_alignment_learns_on_the_selected_pairs() -> None:
    """Each group from the samples selected at its steps, batch by batch, with the latents that they had there."""
    calibration = networks.calibration("guided")
    path = float_path(calibration, batch=2)
    pairs = [(0, 3), (1, 0), (1, 3), (1, 1), (3, 2)]
    found = batches(path, 2, pairs)
    assert [(b.start.index, list(b.start.samples), b.count) for b in found] == [
        (0, [0, 1], 2),
        (0, [3], 2),
        (2, [2], 2),
    ]
    for batch in found:
        received = calibration.trajectory.samples[batch.start.index][list(batch.start.samples)]
        assert torch.equal(batch.start.latents, received)
    assert torch.equal(found[0].target, calibration.trajectory.samples[2][[0, 1]])
    every = collections.Counter(b.start.index for b in batches(path, 1))
    assert every == dict.fromkeys(range(STEPS), SAMPLES // 2)
    calibration = networks.calibration("plain")  # no prompt, whose ranges all rows share
    model = quantize(networks.network("plain"), calibration, Recipe.named("w4a4"))
    learnt = qe.align(model, calibration, AlignmentSettings(group=1, iterations=6, batch=2, pairs="uniform:1"))
    moved = (learnt.table.scale != model.table.scale).any(1)
    ((step, _),) = selected_pairs(calibration, Selection("uniform", 1))
    assert moved.nonzero().flatten().tolist() == [step]


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "density"])
def test_rounding_learns_on_the_selected_pairs(kind: str) -> None:
    """True pairs of the trajectory, in order of their rows; the branches of guidance take turns."""
    calibration = networks.calibration("class")
    guided = Guidance(3.0, {"class_labels": torch.tensor([9])}, calibration.guidance.conditioning)
    calibration = dataclasses.replace(calibration, guidance=guided)
    expected, path = selected_pairs(calibration, Selection(kind, 11), calibration.key["seed"]), calibration.trajectory
    data = learning_set(calibration, 11, f"{kind}:99")
    assert data.rows.tolist() == [step for step, _ in expected]
    heard: dict[int, list[int]] = {}
    for i, (step, sample) in enumerate(expected):
        assert torch.equal(data.inputs["sample"][i], path.samples[step][sample])
        assert float(data.inputs["timestep"][i]) == path.timesteps[step]
        heard.setdefault(sample, []).append(int(data.inputs["class_labels"][i]))
    for sample, labels in heard.items():
        turns = [(3, 7)[sample % 2], 9] if sample % 2 == 0 else [9, (3, 7)[sample % 2]]
        assert labels == [turns[i % 2] for i in range(len(labels))]


def test_other_pairs_round_other_weights() -> None:
    recipes = (Recipe.named("w4a8", learn_pairs=pairs) for pairs in ("every", "density:6", "density:6"))
    first, second, third = (quantize(networks.network("plain"), networks.calibration("plain"), r) for r in recipes)

    def integers(model: qe.IntegerUNet) -> torch.Tensor:
        return torch.cat([w.values.flatten() for parts in model.weights.values() for w in parts])

    assert torch.equal(integers(second), integers(third)) and not torch.equal(integers(first), integers(second))
    with pytest.raises(ValueError, match="learn_pairs must be 'every', 'uniform:N'"):
        Recipe(learn_pairs="all")
    with pytest.raises(ValueError, match="at most the calibration's 16, got 17"):
        quantize(
            networks.network("plain"), networks.calibration("plain"), Recipe.named("w4a8", learn_pairs="uniform:17")
        )


def test_selections_need_a_sampler_without_state() -> None:
    from diffusers import EulerDiscreteScheduler

    calibration = qe.calibrate(
        networks.network("plain"), EulerDiscreteScheduler(), shape=(3, 16, 16), steps=3, samples=2
    )
    model = quantize(networks.network("plain"), calibration, Recipe.named("w4a4"))
    with pytest.raises(
        ValueError, match="can be selected for DDIM and DDPM, whose steps keep no state; use 'every' with Euler"
    ):
        qe.align(model, calibration, AlignmentSettings(group=1, iterations=1, batch=2, pairs="uniform:2"))
