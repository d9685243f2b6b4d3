"""Noise measured on a real integer model, and corrections estimated from it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from correcting import MODES, NAME, SEED, SHAPE, correct, measure, model, noise
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from networks import CASES, SAMPLES, STEPS
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine.correction.estimation import NerWeights
from qdiff_engine.correction.measurement import moments, signal_to_noise
from qdiff_engine.correction.moments import Moments
from qdiff_engine.correction.output import KeptSums, mmse, ner, ptqd
from qdiff_engine.sampling import Guidance, Step, denoise, initial_noise


@functools.cache
def pairs(recipe: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """(e, e_hat) of every step in a recipe's mode, both fed the float trajectory; weights hang on the mode, too."""
    steps: list[Step] = []
    start = initial_noise((SAMPLES, *SHAPE), SEED)
    with torch.no_grad():
        denoise(networks.network(NAME), networks.ddim(), start, steps=STEPS, on_step=steps.append)
    same_weights = model().with_table(model(recipe).table)
    return tuple((s.prediction, same_weights(s.sample, s.timestep).sample) for s in steps)


@pytest.mark.parametrize(("mode", "recipe"), [("A4", "w4a4"), ("A8", "w4a8"), ("A16", "w4a16")])
def test_every_mode_is_measured_as_it_runs(mode: str, recipe: str) -> None:
    """The mode's sums are those of the model's weights in that mode, on the float trajectory's inputs."""
    assert noise().modes == MODES and noise().timesteps == model().table.timesteps
    for row, (e, quantized) in enumerate(pairs(recipe)):
        expected = Moments.of(e, quantized).sums
        assert torch.allclose(noise().sums[MODES.index(mode), row], expected, rtol=1e-9, atol=1e-9)


def test_more_bits_have_less_noise() -> None:
    ratios = [moments(noise(), mode).snr for mode in MODES]
    assert bool((ratios[0] < ratios[1]).all()) and bool((ratios[0] < ratios[2]).all())
    alpha_bar = networks.ddim().alphas_cumprod[[int(t) for t in noise().timesteps]].double()
    assert torch.allclose(signal_to_noise(noise()), alpha_bar / (1 - alpha_bar))


def test_the_models_own_plan_gives_the_same() -> None:
    own = measure()
    rest = [{name: value for name, value in found.key.items() if name != "ranges"} for found in (own, noise())]
    assert own.modes == ("A8",) and rest[0] == rest[1]
    assert own.key["ranges"] == {"A8": noise().key["ranges"]["A8"]}
    assert torch.equal(own.sums[0], noise().sums[1]) and torch.equal(own.sums, measure().sums)
    # another batch size flips single roundings, in the float network's last bits and then in the integer one's
    other = measure(batch=3)
    assert torch.equal(other.sums[..., 0], own.sums[..., 0])
    assert torch.allclose(moments(other, "A8").snr, moments(own, "A8").snr, rtol=0.02)


def test_a_mixed_plan_is_measured_row_by_row() -> None:
    recipe = qe.Recipe.named("w4a8", plan=["A4", "A8", "A8", "A16"])
    mixed = qe.quantize(networks.network(NAME), networks.calibration(NAME), recipe)
    found = measure(model=mixed)
    assert found.modes == MODES
    counts = found.sums[..., 0, 0]
    assert (counts > 0).tolist() == [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    assert moments(found, mixed.table.modes).k.shape == (4,)
    with pytest.raises(ValueError, match="no samples"):
        moments(found, "A4")
    assert correct("ptqd", model=mixed, noise=found).correction is not None


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """One entry for every call of the float network inside."""
    calls: list[int] = []
    handle = networks.network(NAME).register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_an_interrupted_measurement_resumes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: Step) -> None:
        if step.index == 1:
            raise Stop

    with pytest.raises(Stop):
        measure(cache_dir=tmp_path / "cache", on_step=stop)
    assert len(list((tmp_path / "cache").glob("step-*"))) == 2
    with counted() as calls:
        resumed = measure(cache_dir=tmp_path / "cache")
    assert len(calls) == STEPS - 2, "two steps were on disk"
    assert torch.equal(resumed.sums, measure().sums) and resumed.key == measure().key
    # another model of the same network must not resume there
    other = measure(model=model("w8a8"), cache_dir=tmp_path / "cache")
    assert torch.equal(other.sums, measure(model=model("w8a8")).sums)
    assert not torch.equal(other.sums, resumed.sums)


def test_guided_noise_is_that_of_the_guided_prediction() -> None:
    """Both branches differ by their labels; what is measured is e_u + g (e_c - e_u)."""
    case, unet, quantised = CASES["class"], networks.network("class"), networks.integer_model("class", "w4a8")
    labels, none = {"class_labels": torch.tensor([3, 7, 1, 2])}, {"class_labels": torch.tensor([0])}
    given: dict[str, Any] = {"guidance_scale": 3.0, "conditioning": labels, "unconditional": none}
    found = qe.measure_noise(quantised, unet, networks.ddim(), case.shape, samples=SAMPLES, seed=SEED, **given)
    guidance, steps = Guidance(3.0, none, labels), []
    with torch.no_grad():
        denoise(
            unet, networks.ddim(), initial_noise((SAMPLES, *case.shape), SEED), steps=STEPS, guidance=guidance,
            on_step=steps.append,
        )  # fmt: skip
        for row, step in enumerate(steps):
            e_hat = guidance.prediction(quantised, step.sample, step.timestep, range(SAMPLES))
            expected = Moments.of(step.prediction, e_hat).sums
            assert torch.allclose(found.sums[0, row], expected, rtol=1e-6, atol=1e-6)
    assert found.key["guidance_scale"] == 3.0 and found.key["conditioning"] is not None


@pytest.mark.parametrize(("method", "table"), [("ptqd", ptqd), ("mmse", mmse)])
def test_output_tables_are_those_of_the_moments(method: str, table: Any) -> None:
    expected, corrected = table(moments(noise(), "A8")), correct(method)
    assert torch.equal(corrected.table.output_scale, expected.a.float())
    assert torch.equal(corrected.table.output_shift, expected.b.float())
    assert corrected.recipe.correct == method and corrected.correction is not None
    assert corrected.correction.only_output and corrected.noise is noise()
    assert torch.equal(corrected.table.scale, model().table.scale)
    assert model().correction is None and bool((model().table.output_scale == 1).all()), "the first one is unchanged"


def test_ptqd_without_the_clamp() -> None:
    """The quantised prediction of this network falls short of the float one: k < 0, and only the free k removes it."""
    measured = moments(noise(), "A8")
    assert bool((measured.k < 0).all())
    free, clamped = correct("ptqd", clamp=False), correct("ptqd")
    assert torch.equal(free.table.output_scale, ptqd(measured, clamp=False).a.float())
    assert bool((clamped.table.output_scale == 1).all()) and bool((free.table.output_scale > 1).all())


def test_mmse_lowers_the_error_of_every_row() -> None:
    corrected = correct("mmse")
    for (e, quantized), timestep in zip(pairs("w4a8"), noise().timesteps, strict=True):
        row = noise().timesteps.index(timestep)
        a, b = (t[row][:, None, None] for t in (corrected.table.output_scale, corrected.table.output_shift))
        assert float((a * quantized + b - e).square().sum()) < float((quantized - e).square().sum())


def test_latents_keep_the_float_rollouts_mean_and_variance() -> None:
    corrected = correct("mmse+ibc+ivc", model=model("w4a16"), noise=measure(model=model("w4a16")))
    found = corrected.correction
    assert found is not None and found.input_bias.shape == (STEPS, *SHAPE) and bool((found.input_scale != 1).all())
    paths: list[list[Step]] = [[], []]
    start = initial_noise((SAMPLES, *SHAPE), SEED)
    with torch.no_grad():
        denoise(networks.network(NAME), networks.ddim(), start, steps=STEPS, on_step=paths[0].append)
        given = {"steps": STEPS, "correction": found, "on_step": paths[1].append}
        denoise(corrected, networks.ddim(), start, **given)
    for one, other in zip(*paths, strict=True):
        x, quantised = one.previous.double(), other.previous.double()
        assert torch.allclose(x.mean(0), quantised.mean(0), atol=1e-5)
        spread, own = (float(value.var(0, correction=0).mean()) for value in (x, quantised))
        assert own == pytest.approx(spread, rel=1e-5)


def test_a_model_with_learnt_steps_is_measured_with_them() -> None:
    """Measured with the calibration, which alone knows other modes, its own mode runs its own step sizes."""
    calibration = networks.calibration(NAME)
    recipe = qe.Recipe.named("w4a8", weights="adaround", learn_iterations=2, step_sizes="learnt")
    learnt = qe.quantize(networks.network(NAME), calibration, recipe)
    settings = {"shape": SHAPE, "samples": SAMPLES, "seed": SEED}
    unet, scheduler = networks.network(NAME), networks.ddim()
    own = qe.measure_noise(learnt, unet, scheduler, **settings)
    every = qe.measure_noise(learnt, unet, scheduler, calibration=calibration, **settings)
    assert own.modes == ("A8",) and torch.equal(every.sums[every.modes.index("A8")], own.sums[0])


def test_ner_follows_the_corrected_rollout() -> None:
    """Each row's K is that of (float rollout, rollout that carries the corrections of the rows before).

    In mode A16, where no flipped rounding magnifies the last bits in which folded and unfolded corrections differ.
    """
    quantised = model("w4a16")
    corrected = correct("ner+ibc", model=quantised, noise=measure(model=quantised))
    assert corrected.correction is not None
    float_steps: list[Step] = []
    steps: list[Step] = []
    start = initial_noise((SAMPLES, *SHAPE), SEED)
    fed_float = []
    with torch.no_grad():
        denoise(networks.network(NAME), networks.ddim(), start, steps=STEPS, on_step=float_steps.append)
        given = {"steps": STEPS, "correction": corrected.correction, "on_step": steps.append}
        denoise(corrected, networks.ddim(), start, **given)
        for row, (own, other) in enumerate(zip(steps, float_steps, strict=True)):
            e_hat = quantised(own.sample, own.timestep).sample
            k = ner(KeptSums.of(other.prediction, e_hat))
            assert torch.allclose(corrected.table.output_scale[row].double(), k, atol=1e-5)
            drift = (other.previous - own.previous).double().mean(0)
            assert float(drift.abs().max()) < 1e-5, "the input bias removes the mean drift of its own samples"
            fed_float.append(ner(KeptSums.of(other.prediction, quantised(other.sample, other.timestep).sample)))
    assert bool((corrected.table.output_shift == 0).all())
    assert bool((corrected.correction.input_bias != 0).any())
    assert torch.allclose(corrected.table.output_scale[0].double(), fed_float[0], atol=1e-5)
    assert not torch.allclose(corrected.table.output_scale[-1].double(), fed_float[-1], atol=1e-4)


def test_ner_settings() -> None:
    default, published = correct("ner"), correct("ner", ner_weights=NerWeights(published=True))
    near_one = correct("ner", ner_weights=NerWeights(lambda2=1e9))
    assert not torch.equal(default.table.output_scale, published.table.output_scale)
    assert torch.allclose(near_one.table.output_scale, torch.ones(STEPS, 3), atol=1e-6)


def test_the_variance_schedule_of_a_stochastic_sampler() -> None:
    """s'^2 = s^2 - ce^2 a^2 q for DDIM with eta 1, clamped at 0; with eta 0 nothing is left to calibrate."""
    found = measure(eta=1.0)
    corrected = correct("ptqd+vsc", noise=found)
    assert corrected.correction is not None
    stepper = networks.ddim()
    stepper.set_timesteps(STEPS)
    left = ptqd(moments(found, "A8")).noise_variance
    for row, t in enumerate(int(t) for t in stepper.timesteps):
        before = t - 1000 // STEPS
        ab = float(stepper.alphas_cumprod[t])
        ab_before = float(stepper.alphas_cumprod[before]) if before >= 0 else 1.0
        variance = (1 - ab_before) / (1 - ab) * (1 - ab / ab_before)
        ce = math.sqrt(max(0.0, 1 - ab_before - variance)) - math.sqrt(ab_before * (1 - ab) / ab)
        scale = math.sqrt(max(0.0, variance - ce**2 * float(left[row])) / variance) if variance > 1e-12 else 1.0
        assert float(corrected.correction.sigma_scale[row]) == pytest.approx(scale, rel=1e-3, abs=1e-3)
    assert bool((corrected.correction.sigma_scale < 1).any())
    with pytest.warns(UserWarning, match=r"\+vsc does nothing, this sampler adds no noise"):
        still = correct("ptqd+vsc")
    assert still.correction is not None and still.correction.only_output


def test_a_clipping_sampler_is_told_of() -> None:
    unet, scheduler = networks.network(NAME), networks.ddim(clip_sample=True)
    calibration = qe.calibrate(unet, scheduler, shape=SHAPE, steps=3, samples=2, eta=1.0)
    quantised = qe.quantize(unet, calibration, qe.Recipe.named("w4a8"))
    found = qe.measure_noise(quantised, unet, scheduler, SHAPE, samples=2)
    with pytest.warns(UserWarning, match=r"\+vsc is approximate, the sampler clips the predicted sample"):
        qe.correct(quantised, unet, scheduler, found, "none+vsc", shape=SHAPE)


def test_keys_of_strangers_never_fit() -> None:
    """A key without the fields that must agree is another setting, not a fitting one."""
    from qdiff_engine.samplers import differences, sampler_key

    mine = sampler_key(networks.ddim(), STEPS, 0.0, None)
    assert differences(mine, mine) == []
    for key in (
        {},
        {**mine, "scheduler": None},
        {**mine, "scheduler": {}},
        {**mine, "steps": "4"},
        {**mine, "eta": []},
    ):
        assert differences(key, mine)
    for changes in ({"steps": None}, {"eta": "0"}):
        strange = dataclasses.replace(noise(), key={**noise().key, **changes})
        with pytest.raises(ValueError, match="noise has no valid key"):
            correct("ptqd", noise=strange)


def test_rollouts_resume(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(index: int) -> None:
        if index == 2:
            raise Stop

    with pytest.raises(Stop):
        correct("ner+ibc", cache_dir=tmp_path / "cache", on_step=stop)
    assert len(list((tmp_path / "cache").glob("step-*"))) == 3
    seen: list[int] = []
    with counted() as calls:
        resumed = correct("ner+ibc", cache_dir=tmp_path / "cache", on_step=seen.append)
    whole = correct("ner+ibc")
    assert len(calls) == STEPS - 3, "three steps were on disk"
    assert seen == [0, 1, 2, 3] and resumed.correction is not None and whole.correction is not None
    assert torch.equal(resumed.table.output_scale, whole.table.output_scale)
    assert torch.equal(resumed.correction.input_bias, whole.correction.input_bias)


def test_other_samplers_take_output_corrections_only() -> None:
    """Noise of an Euler trajectory corrects the output there; a bias or a variance is refused."""
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading")
    unet, case = networks.network(NAME), CASES[NAME]
    calibration = qe.calibrate(unet, scheduler, shape=case.shape, steps=3, samples=2)
    quantised = qe.quantize(unet, calibration, qe.Recipe.named("w4a8"))
    found = qe.measure_noise(quantised, unet, scheduler, case.shape, samples=2)
    corrected = qe.correct(quantised, unet, scheduler, found, "mmse", shape=case.shape)
    images = qe.sample(corrected, scheduler, (1, *case.shape), steps=3, strict=True)
    assert not torch.equal(images, qe.sample(quantised, scheduler, (1, *case.shape), steps=3))
    assert qe.correct(quantised, unet, scheduler, found, "ner", shape=case.shape).correction is not None
    for method in ("mmse+ibc", "none+vsc"):
        with pytest.raises(ValueError, match="are for DDIM and DDPM, got EulerDiscreteScheduler"):
            qe.correct(quantised, unet, scheduler, found, method, shape=case.shape)


def test_wrong_measurements() -> None:
    unet = networks.network(NAME)
    for changes, message in (
        ({"samples": 0}, "samples must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\]"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\]"),
        ({"steps": 3}, "3 timesteps, the model is calibrated on 4"),
        ({"modes": ["A4"]}, "A4 are not in the model's plan"),
        ({"modes": ["A5"]}, "modes must be some of A4, A8, A16, got A5"),
        ({"modes": []}, "modes must be some of A4, A8, A16, got none"),
        ({"calibration": networks.calibration("cifar")}, "calibration is not the one"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(**changes)
    with pytest.raises(ValueError, match="its parameters have another hash"):
        qe.measure_noise(model(), networks.network("cifar"), networks.ddim(), SHAPE)
    with pytest.raises(TypeError, match="model must be an IntegerUNet, got"):
        qe.measure_noise(unet, unet, networks.ddim(), SHAPE)
    with pytest.raises(TypeError, match="unet must be a torch module"):
        qe.measure_noise(model(), toy, networks.ddim(), SHAPE)


def toy(x: Tensor, t: Tensor) -> Tensor:
    return x


def test_wrong_corrections() -> None:
    with pytest.raises(ValueError, match="correct must be none, ptqd, mmse or ner"):
        correct("ptq")
    with pytest.raises(ValueError, match="noise must be given"):
        correct("ptqd", noise=None)
    with pytest.raises(ValueError, match="another setting: scheduler clip_sample True, not False"):
        correct("ptqd", scheduler=networks.ddim(clip_sample=True))
    with pytest.raises(ValueError, match="scheduler class DDPMScheduler, not DDIMScheduler"):
        correct("ptqd", scheduler=DDPMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="the noise of A8 was not measured, only that of A4"):
        correct("ptqd", noise=measure(calibration=networks.calibration(NAME), modes=["A4"]))
    with pytest.raises(ValueError, match="another setting: weights of 4 bits, not 8"):
        correct("ptqd", model=model("w8a8"))
    with pytest.raises(ValueError, match="another setting: other integer weights or weight scales"):
        correct("ptqd", model=model("w4a4"))  # GPTQ rounds for the activations that a layer will meet
    with pytest.raises(ValueError, match="noise has no valid key: steps 4, eta 0.0, samples None"):
        correct("ptqd", noise=dataclasses.replace(noise(), key={"steps": 4, "eta": 0.0}))
    with pytest.raises(ValueError, match="lambda1 must lie in"):
        correct("ner", ner_weights=NerWeights(lambda1=2.0))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        correct("ner", samples=0)


def test_noise_of_other_activation_scales_is_refused() -> None:
    """The same integer weights in the same mode: ranges alone differ, in all rows or in one."""
    unet, calibration = networks.network(NAME), networks.calibration(NAME)
    mse, minmax = (qe.quantize(unet, calibration, qe.Recipe(observer=observer)) for observer in ("mse", "minmax"))
    found = measure(model=mse, calibration=calibration)
    assert correct("mmse", model=mse, noise=found).table.corrects()
    scale = mse.table.scale.clone()
    scale[2, 1] *= 1.01
    for other in (minmax, mse.with_table(dataclasses.replace(mse.table, scale=scale))):
        with pytest.raises(ValueError, match="noise was measured in another setting: other activation scales"):
            correct("mmse", model=other, noise=found)
    plan = qe.quantize(unet, calibration, qe.Recipe(plan=("A8", "A4", "A16", "A8")))
    assert correct("mmse", model=plan, noise=found).table.corrects(), "every mode was measured with its own scales"
    for ranges in ("", {}, {"A8": "x"}, {"A8": found.key["ranges"]["A8"][:3]}):
        with pytest.raises(ValueError, match="other activation scales"):
            correct("mmse", model=mse, noise=dataclasses.replace(found, key={**found.key, "ranges": ranges}))


def test_one_sample_is_enough_to_be_defined() -> None:
    found = measure(samples=1)
    for method in ("ptqd", "mmse", "ner+ibc+vsc"):
        corrected = correct(method, noise=found)
        assert bool(torch.isfinite(corrected.table.output_scale).all())
        image = qe.sample(corrected, networks.ddim(), (1, *SHAPE), steps=STEPS, strict=True)
        assert bool(torch.isfinite(image).all())


def test_a_recipe_that_asks_for_a_correction_says_what_to_call() -> None:
    recipe = qe.Recipe.named("w4a8", correct="mmse+ibc")
    with pytest.warns(UserWarning, match=r"correct='mmse\+ibc', which needs the sampler"):
        quantised = qe.quantize(networks.network(NAME), networks.calibration(NAME), recipe)
    corrected = correct(quantised.recipe.correct, model=quantised)
    assert corrected.correction is not None and corrected.correction.method == "mmse+ibc"
    cleared = correct("none", model=corrected)
    assert cleared.correction is None and bool((cleared.table.output_scale == 1).all())
    assert cleared.noise is noise(), "what was measured stays"
