"""The Triton kernel of a denoising step against `reference` and diffusers; in the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import CHANNELS_LAST, DEVICE, assert_as_close_as_torch, on_device, surrounded
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from qdiff_kernels.denoise_step import denoise_step

from qdiff_engine import reference

pytestmark = pytest.mark.usefixtures("kernels", "poisoned_memory")

DTYPES = [torch.float32, torch.float16]
CONSTANTS = torch.tensor([0.9, 0.4, -0.3, 0.2, 0.6, 0.8, 1.0, 7.5])


def plain_step(x: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """The reference's formula for the clipped epsilon step, in x's dtype."""
    cx, c0, ce, sigma, signal, deviation, clip, g = CONSTANTS.tolist()
    a, b, input_bias = (options[name].to(x.dtype)[:, None, None] for name in ("a", "b", "input_bias"))
    e = (uncond + g * (cond - uncond)) * a + b
    sample = ((x - deviation * e) / signal).clamp(-clip, clip)
    return cx * x + c0 * sample + ce * e + sigma * noise + input_bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 33), (1, 4, 32, 32), (3, 5, 63)])
def test_denoise_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, cond, uncond, noise = (torch.randn(shape).to(dtype) for _ in range(4))
    correction = {name: torch.randn(shape[1]) for name in ("a", "b", "input_bias")}
    mapped = {**correction, "input_bias": torch.randn(shape[1:])}
    tensors = [surrounded(value) for value in (x, cond, uncond, noise)]
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        for clipped in (False, True):
            for options in ({}, correction, mapped, {"guidance": 1.5}):
                given: dict[str, Any] = {"prediction_type": prediction_type, "clipped": clipped, **options}
                exact = reference.denoise_step(x, cond, uncond, noise, CONSTANTS, **given)
                y = denoise_step(*tensors, CONSTANTS.to(DEVICE), **on_device(given))
                assert y.dtype == dtype and y.shape == x.shape
                # float32 arithmetic on terms of up to about 30, then one rounding to dtype
                bound = 32 * torch.finfo(torch.float32).eps + exact.abs() * torch.finfo(dtype).eps / 2
                assert bool(((y.cpu().double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_denoise_step_is_as_close_as_torch(dtype: torch.dtype) -> None:
    x, cond, uncond, noise = (torch.randn(2, 4, 32, 32).to(dtype) for _ in range(4))
    correction = {name: torch.randn(4) for name in ("a", "b", "input_bias")}
    exact = reference.denoise_step(x, cond, uncond, noise, CONSTANTS, clipped=True, **correction)
    tensors = [value.to(DEVICE) for value in (x, cond, uncond, noise, CONSTANTS)]
    y = denoise_step(*tensors, clipped=True, **on_device(correction))
    assert_as_close_as_torch(y, plain_step(x, cond, uncond, noise, **correction), exact)


def test_denoise_step_without_guidance_noise_or_correction() -> None:
    x, e = torch.randn(2, 4, 9, 7), torch.randn(2, 4, 9, 7)
    y = denoise_step(x.to(DEVICE), e.to(DEVICE), None, None, CONSTANTS.to(DEVICE))
    assert torch.allclose(y.cpu().double(), reference.denoise_step(x, e, None, None, CONSTANTS), atol=1e-6, rtol=1e-6)


def test_denoise_step_reads_every_memory_layout() -> None:
    x, noise = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    both = torch.randn(4, 4, 6, 5).contiguous(memory_format=CHANNELS_LAST)
    uncond, cond = both.chunk(2)
    expected = reference.denoise_step(x, cond, uncond, noise.half(), CONSTANTS)
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        given = x.to(DEVICE).contiguous(memory_format=layout)
        halves = both.to(DEVICE).chunk(2)
        y = denoise_step(given, halves[1], halves[0], noise.to(DEVICE).half(), CONSTANTS.to(DEVICE))
        assert torch.allclose(y.cpu().double(), expected, atol=1e-5, rtol=1e-5)
        assert y.is_contiguous(memory_format=layout)
    turned = x.to(DEVICE).transpose(2, 3).contiguous().transpose(2, 3)
    y = denoise_step(turned, halves[1], halves[0], noise.to(DEVICE).half(), CONSTANTS.to(DEVICE))
    assert torch.allclose(y.cpu().double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_table_expresses_ddim_and_ddpm(prediction_type: str, clip: bool) -> None:
    """One formula, two schedulers: DDIM goes from (x0, e') alone, DDPM from (x0, x)."""
    diffusers = pytest.importorskip("diffusers")
    config: dict[str, Any] = {"prediction_type": prediction_type, "clip_sample": clip, "clip_sample_range": 0.7}
    ddim = diffusers.DDIMScheduler(set_alpha_to_one=False, **config)
    ddpm = diffusers.DDPMScheduler(**config)
    x, output = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    limit = 0.7 if clip else torch.finfo(torch.float32).max
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(50)
        t = 500
        alpha_bar, before = (float(scheduler.alphas_cumprod[i]) for i in (t, t - 20))
        signal, deviation = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if scheduler is ddim:
            row = [0.0, before**0.5, (1 - before) ** 0.5, 0.0]
            step = ddim.step(output, t, x, eta=0.0).prev_sample
        else:
            alpha = alpha_bar / before
            row = [alpha**0.5 * (1 - before) / (1 - alpha_bar), before**0.5 * (1 - alpha) / (1 - alpha_bar), 0.0]
            row.append(((1 - before) / (1 - alpha_bar) * (1 - alpha)) ** 0.5)
            step = ddpm.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        constants = [*row, signal, deviation, limit, 1.0]
        given: dict[str, Any] = {"prediction_type": prediction_type, "clipped": True}
        expected = reference.denoise_step(x, output, None, noise, constants, **given)
        assert torch.allclose(expected, step, rtol=1e-5, atol=1e-5)
        tensors = [value.float().to(DEVICE) for value in (x, output, noise)]
        y = denoise_step(*tensors[:2], None, tensors[2], torch.tensor(constants, device=DEVICE), **given)
        assert torch.allclose(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_an_empty_result() -> None:
    x = torch.ones(0, 6, 4, 4, device=DEVICE)
    assert denoise_step(x, x, None, None, torch.ones(8, device=DEVICE)).shape == x.shape


def test_two_runs_give_the_same_bits() -> None:
    x, constants = torch.randn(1, 33, 24, 24).half().to(DEVICE), CONSTANTS.to(DEVICE)
    assert torch.equal(denoise_step(x, x, None, x, constants), denoise_step(x, x, None, x, constants))


X = torch.ones(1, 2, 3, 4)


def step(**options: Any) -> Tensor:
    given = {"x": X, "cond": X, "uncond": None, "noise": None, "constants": torch.ones(8)} | options
    return denoise_step(**given)


WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, r"cond must be \[1, 2, 3, 4\] like x", lambda: step(cond=X[0])),
    (ValueError, "noise must be", lambda: step(noise=X[..., :2])),
    (TypeError, "uncond must be float16", lambda: step(uncond=X.int())),
    (ValueError, r"constants must be dense \[8\], got \[7\]", lambda: step(constants=torch.ones(7))),
    (ValueError, r"input_bias must be dense \[2\]", lambda: step(input_bias=torch.ones(3))),
    (ValueError, r"input_bias must be dense \[2\] or \[2, ", lambda: step(input_bias=torch.ones(2, 1))),
    (TypeError, "input_bias must be float32", lambda: step(input_bias=torch.ones(2, 3, 4).double())),
    (ValueError, "prediction_type must be one of", lambda: step(prediction_type="flow")),
    (TypeError, "guidance must be a number", lambda: step(guidance="7.5")),
]


@pytest.mark.parametrize("error, message, call", WRONG)
def test_wrong_arguments_are_named(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
