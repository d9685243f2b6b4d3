"""The sampler's step as one operator: equal to the unfused formula in float64, on every backend, for every setting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparing import present
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from networks import normal
from torch import Tensor

from qdiff_engine import ops, reference
from qdiff_engine.samplers import Stepper, coefficients, prepared
from qdiff_engine.tables import Correction

SHAPE = (3, 4, 9, 7)


@pytest.fixture(params=["triton", "native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that makes a sampler's step."""
    return present(request.param)


def images(seed: int, count: int = 4) -> list[Tensor]:
    return [normal(*SHAPE, seed=seed + i) for i in range(count)]


def per_channel(seed: int, mean: float = 0.0) -> Tensor:
    return mean + 0.3 * normal(SHAPE[1], seed=seed)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clipped", [False, True])
def test_every_backend_is_the_formula(backend: str, prediction_type: str, clipped: bool) -> None:
    x, cond, uncond, noise = images(1)
    constants = torch.tensor([0.9, 0.4, -0.3, 0.2, 0.6, 0.8, 1.0, 7.5])
    corrections = {"a": per_channel(7, 1.0), "b": per_channel(8), "input_bias": per_channel(9)}
    mapped = {**corrections, "input_bias": normal(*SHAPE[1:], seed=10)}
    for given in ((cond, uncond, noise), (cond, None, noise), (cond, uncond, None), (cond, None, None)):
        for options in ({}, corrections, mapped, {"guidance": 2.0}):
            keywords: dict[str, Any] = {"prediction_type": prediction_type, "clipped": clipped, **options}
            exact = reference.denoise_step(x, *given, constants, **keywords)
            actual = ops.denoise_step(x, *given, constants, backend=backend, **keywords)
            assert actual.dtype == x.dtype and actual.shape == x.shape
            assert float((actual - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))


def test_half_precision_and_layouts(backend: str) -> None:
    x, cond, uncond, noise = (t.half().contiguous(memory_format=torch.channels_last) for t in images(2))
    constants = torch.tensor([0.0, 0.9, 0.4, 0.1, 0.6, 0.8, 3e38, 3.0])
    exact = reference.denoise_step(x, cond, uncond, noise, constants, clipped=True)
    actual = ops.denoise_step(x, cond, uncond, noise, constants, clipped=True, backend=backend)
    assert actual.dtype == torch.float16
    assert bool(((actual.double() - exact).abs() <= 1e-4 + exact.abs() * 2**-11).all())


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cond": torch.ones(3, 4, 9, 8)}, ValueError, r"cond must be \[3, 4, 9, 7\] like x"),
    ({"noise": torch.ones(SHAPE, dtype=torch.int32)}, TypeError, "noise must be floating"),
    ({"constants": torch.ones(7)}, ValueError, r"constants must be float32 \[8\]"),
    ({"constants": torch.ones(8).double()}, ValueError, "constants must be float32"),
    ({"a": torch.ones(3)}, ValueError, r"a must be float32 \[4\]"),
    ({"input_bias": torch.ones(3)}, ValueError, r"input_bias must be float32 \[4\]"),
    ({"input_bias": torch.ones(4, 1)}, ValueError, r"input_bias must be float32 \[4, 9, 7\]"),
    ({"input_bias": torch.ones(SHAPE)}, ValueError, r"input_bias must be float32 \[4, 9, 7\]"),
    ({"prediction_type": "flow"}, ValueError, "prediction_type must be"),
    ({"guidance": "7"}, TypeError, "guidance must be a number"),
    ({"x": torch.ones(SHAPE, dtype=torch.int64)}, ValueError, "x must be floating"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x, cond, uncond, noise = images(1)
    arguments = {"x": x, "cond": cond, "uncond": uncond, "noise": noise, "constants": torch.ones(8), **changes}
    with pytest.raises(error, match=message):
        ops.denoise_step(backend=backend, **arguments)


def unfused(
    kind: str, scheduler: Any, index: int, eta: float, x: Tensor, e: Tensor, z: Tensor, a: Tensor, b: Tensor,
    bias: Tensor, scale: float, gain: float,
) -> Tensor:  # fmt: skip
    """The papers' formulas in float64 (DDIM: Song et al. 2021, eq. 12; DDPM: Ho et al. 2020, eq. 7), corrected."""
    x, e, z, a, b, bias = (t.double() for t in (x, e, z, a[:, None, None], b[:, None, None], bias))
    e = a * e + b
    t = int(scheduler.timesteps[index])
    before = int(scheduler.timesteps[index + 1]) if index + 1 < len(scheduler.timesteps) else -1
    ab = float(scheduler.alphas_cumprod[t])
    ab_before = float(scheduler.alphas_cumprod[before]) if before >= 0 else 1.0
    if kind == "ddim" and before < 0:
        ab_before = float(scheduler.final_alpha_cumprod)
    s, d, config = math.sqrt(ab), math.sqrt(1 - ab), scheduler.config
    x0, eps = {
        "epsilon": lambda: ((x - d * e) / s, e),
        "v_prediction": lambda: (s * x - d * e, s * e + d * x),
        "sample": lambda: (e, (x - s * e) / d),
    }[config.prediction_type]()
    if config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    beta = 1 - ab / ab_before
    sigma = math.sqrt((1 - ab_before) / (1 - ab) * beta)
    if kind == "ddim":
        sigma *= eta
        mean = math.sqrt(ab_before) * x0 + math.sqrt(1 - ab_before - sigma**2) * eps
    else:
        mean = math.sqrt(ab_before) * beta / (1 - ab) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - ab_before) / (1 - ab) * x
        sigma = 0.0 if t == 0 else math.sqrt(beta) if config.variance_type == "fixed_large" else sigma
    return gain * (mean + scale * sigma * z) + bias


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize(
    ("kind", "eta", "changes"),
    [
        ("ddim", 0.0, {}),
        ("ddim", 1.0, {"set_alpha_to_one": False}),
        ("ddpm", 0.0, {}),
        ("ddpm", 0.0, {"variance_type": "fixed_large"}),
        ("ddpm", 0.0, {"variance_type": "fixed_small_log"}),
    ],
)
@pytest.mark.parametrize("guided", [False, True])
def test_a_corrected_step_is_the_unfused_formula(
    kind: str, eta: float, changes: dict[str, Any], prediction_type: str, clip_sample: bool, guided: bool
) -> None:
    """Guidance, correction, update, calibrated noise and the latents' correction in one operator, to 1e-5."""
    make = DDIMScheduler if kind == "ddim" else DDPMScheduler
    scheduler = make(prediction_type=prediction_type, clip_sample=clip_sample, **changes)
    steps, n = 10, SHAPE[0]
    times = tuple(float(t) for t in prepared(scheduler, steps).timesteps)
    biases, scales = 0.05 * normal(steps, *SHAPE[1:], seed=3), torch.linspace(0, 1, steps)
    gains = torch.linspace(0.8, 1.1, steps)
    correction = Correction("ner+ibc+ivc+vsc", {}, times, biases, scales, gains)
    guidance_scale = 4.0 if guided else None
    stepper = Stepper(scheduler, steps, eta, 5, n, guidance_scale, correction)
    generators = [torch.Generator().manual_seed(5 * 1_000_003 + j + 1) for j in range(n)]
    for i in range(steps):
        x, cond, uncond, _ = images(10 * i)
        a, b = per_channel(100 + i, 1.0), per_channel(200 + i)
        e = (uncond.double() + 4.0 * (cond.double() - uncond.double())) if guided else cond
        noisy = stepper.coefficients is not None and stepper.coefficients[i].sigma > 0
        z = torch.cat([torch.randn(1, *SHAPE[1:], generator=g) for g in generators]) if noisy else torch.zeros(SHAPE)
        arguments = (x, e, z, a, b, biases[i], float(scales[i]), float(gains[i]))
        expected = unfused(kind, stepper.scheduler, i, eta, *arguments)
        actual = stepper.step(i, x, cond, uncond if guided else None, a=a, b=b)
        assert float((actual - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0)])
def test_the_output_coefficient_is_the_derivative(kind: str, eta: float, prediction_type: str) -> None:
    """ce = dx'/de of an unclipped step: what an error of the prediction becomes."""
    make = DDIMScheduler if kind == "ddim" else DDPMScheduler
    stepper = Stepper(make(prediction_type=prediction_type, clip_sample=False), 8, eta, 0, SHAPE[0])
    again = Stepper(make(prediction_type=prediction_type, clip_sample=False), 8, eta, 0, SHAPE[0])
    assert stepper.coefficients is not None
    for i, row in enumerate(stepper.coefficients):
        x, e, *_ = images(i)
        moved = again.step(i, x, e + 0.5) - stepper.step(i, x, e)
        assert torch.allclose(moved, torch.full(SHAPE, 0.5 * row.output_coefficient), rtol=2e-3, atol=2e-5)


def test_ddpms_variance_uses_the_strided_schedule() -> None:
    """beta^2 / (alpha (1 - alpha_bar)) with alpha = alpha_bar / alpha_bar', which ce^2 contains."""
    scheduler = prepared(DDPMScheduler(clip_sample=False), 50)
    rows = coefficients(scheduler)
    assert rows is not None
    t, before = int(scheduler.timesteps[20]), int(scheduler.timesteps[21])
    ab, ab_before = float(scheduler.alphas_cumprod[t]), float(scheduler.alphas_cumprod[before])
    alpha = ab / ab_before
    assert rows[20].output_coefficient ** 2 == pytest.approx((1 - alpha) ** 2 / (alpha * (1 - ab)), rel=1e-4)
    assert ((1 - alpha) / float(scheduler.betas[t])) ** 2 > 100, "the unstrided beta is far too small"


def test_samplers_that_are_not_fused() -> None:
    euler = EulerDiscreteScheduler()
    assert coefficients(prepared(euler, 5)) is None
    assert coefficients(prepared(DDPMScheduler(variance_type="learned_range"), 5)) is None
    plain = Correction("ptqd", {}, (1.0,), torch.zeros(1, 4), torch.ones(1), torch.ones(1))
    assert Stepper(euler, 5, 0.0, 0, 2, None, plain).coefficients is None
    biased = Correction("none+ibc", {}, (1.0,), torch.ones(1, 4), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="EulerDiscreteScheduler takes no input bias"):
        Stepper(euler, 5, 0.0, 0, 2, None, biased)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_its_range(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        coefficients(prepared(DDIMScheduler(), 5), eta)


def test_euler_steps_with_a_corrected_prediction() -> None:
    """Another sampler takes a and b through its own step, and guidance before them."""
    stepper, again = (Stepper(EulerDiscreteScheduler(), 5, 0.0, 0, SHAPE[0], 3.0) for _ in range(2))
    x, cond, uncond, _ = images(4)
    a, b = per_channel(1, 1.0), per_channel(2)
    stepper.received(0, x), again.received(0, x)
    corrected = a[:, None, None] * (uncond + 3.0 * (cond - uncond)) + b[:, None, None]
    assert torch.allclose(stepper.step(0, x, cond, uncond, a, b), again.step(0, x, corrected), atol=1e-5)


BAD_TABLES: list[tuple[dict[str, Any], str]] = [
    ({"input_bias": torch.ones(2, 4)}, "input_bias must be float32 with 1 rows"),
    ({"input_bias": torch.full((1, 4), math.nan)}, "input_bias must be finite"),
    ({"input_scale": torch.zeros(1)}, "input_scale must be positive"),
    ({"input_scale": torch.ones(2)}, "input_scale must be float32 with 1 rows"),
    ({"sigma_scale": torch.ones(1).double()}, "sigma_scale must be float32"),
    ({"sigma_scale": torch.full((1,), 1.5)}, r"sigma_scale must lie in \[0, 1\]"),
    ({"sigma_scale": torch.full((1,), -0.1)}, r"sigma_scale must lie in \[0, 1\]"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TABLES)
def test_tables_of_corrections_are_checked(changes: dict[str, Any], message: str) -> None:
    fields = {"input_bias": torch.ones(1, 4), "sigma_scale": torch.ones(1), "input_scale": torch.ones(1), **changes}
    with pytest.raises(ValueError, match=message):
        Correction("ner+ibc+vsc", {}, (1.0,), **fields)
