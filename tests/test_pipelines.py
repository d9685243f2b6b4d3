"""`pipe.unet = model`: diffusers' pipelines run the integer network unchanged; and what a wrong call says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from networks import CASES, SAMPLES, normal, relative
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.evaluation import image_psnr

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved W8A8 model of a network calibrated for DDIM with 4 steps."""
    folder = tmp_path_factory.mktemp("pipelines") / "artifact"
    networks.integer_model("unet2d").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory, demo_unet: nn.Module) -> Path:
    """The bundled network at W8A8, calibrated on ten DDIM steps."""
    folder = tmp_path_factory.mktemp("bundled") / "artifact"
    qe.quantize(demo_unet, networks.bundled_calibration(), qe.Recipe.named("w8a8")).save_pretrained(folder)
    return folder


def images(pipe: Any, steps: int, **keywords: Any) -> Tensor:
    """Eight images as a pipeline returns them, in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(j) for j in range(8)]
    array = pipe(batch_size=8, generator=generator, num_inference_steps=steps, output_type="np", **keywords).images
    return torch.from_numpy(array).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize(("kind", "steps"), [("ddim", 10), ("ddim", 7), ("ddpm", 10), ("ddpm", 7)])
def test_pipelines(kind: str, steps: int, bundled: Path, demo_unet: nn.Module, demo_scheduler: Any) -> None:
    """At the calibrated step count and at another; the noise comes from the generator, so the images are comparable."""
    if kind == "ddim":
        pipe: Any = DDIMPipeline(unet=copy.deepcopy(demo_unet), scheduler=demo_scheduler)
    else:
        pipe = DDPMPipeline(unet=copy.deepcopy(demo_unet), scheduler=DDPMScheduler.from_config(demo_scheduler.config))
    expected = images(pipe, steps)
    pipe.unet = qe.load(bundled)
    actual = images(pipe, steps)
    assert actual.shape == (8, 1, 32, 32) and bool(torch.isfinite(actual).all())
    psnr = image_psnr(actual, expected, pixels=True)
    print(f"{kind}, {steps} steps: {', '.join(f'{p:.1f} dB' for p in psnr)}")
    assert sum(psnr) / len(psnr) > 30
    pipe.to("cpu")
    assert torch.equal(actual, images(pipe, steps))
    if kind == "ddim":
        stochastic = images(pipe, steps, eta=1.0)
        assert bool(torch.isfinite(stochastic).all()) and not torch.equal(stochastic, actual)


def test_pipeline_of_another_precision_and_size_is_refused(artifact: Path) -> None:
    model = qe.load(artifact)
    with pytest.raises(ValueError, match="load the artifact with device='cuda'"):
        model.to("cuda")
    assert model.to(torch.float16) is model and model.to("cpu") is model
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert model.config.sample_size == model.config["sample_size"] == 16 and model.config.in_channels == 3
    with pytest.raises(AttributeError, match="no 'nonsense'"):
        _ = model.config.nonsense
    assert not model.training and model.eval() is model


def test_half_precision_latents_give_half_precision_predictions(artifact: Path) -> None:
    model, x = qe.load(artifact), normal(2, *SIZE)
    for dtype in (torch.float16, torch.bfloat16):
        output = model(x.to(dtype), 500, return_dict=False)[0]
        assert output.dtype == dtype
        assert torch.equal(output, model(x.to(dtype).float(), 500).sample.to(dtype))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_stable_diffusions_call(name: str) -> None:
    """Everything that StableDiffusionPipeline and its XL sister pass: a 0-d timestep, guidance's double batch."""
    model, given = networks.integer_model(name), networks.conditioning(name, SAMPLES)
    words: dict[str, Any] = {"timestep_cond": None, "cross_attention_kwargs": None}
    words["encoder_hidden_states"] = given["encoder_hidden_states"]
    words["added_cond_kwargs"] = given.get("added_cond_kwargs")
    scheduler = networks.ddim()
    scheduler.set_timesteps(networks.STEPS)
    for t, calibrated in zip(scheduler.timesteps, networks.trajectory(name), strict=True):
        latents = calibrated.sample
        assert t.dim() == 0
        prediction = model(scheduler.scale_model_input(latents, t), t, return_dict=False, **words)[0]
        with torch.no_grad():
            expected = networks.network(name)(latents, t, return_dict=False, **words)[0]
        assert prediction.shape == latents.shape and relative(prediction, expected) < 0.07
        without, with_ = prediction.chunk(2)
        step = scheduler.step(torch.cat([without + 2.0 * (with_ - without)] * 2), t, latents, return_dict=False)[0]
        assert bool(torch.isfinite(step).all())


def test_timesteps_of_every_kind(artifact: Path) -> None:
    model, x = qe.load(artifact), normal(2, *SIZE)
    expected = model(x, 500).sample
    kinds = [500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), torch.tensor(500.0)]
    for timestep in [*kinds, torch.tensor([500], dtype=torch.int32)]:
        assert torch.equal(model(x, timestep)[0], expected)
    assert torch.equal(model(sample=x, timestep=500, return_dict=False)[0], expected)
    between = model(x, 499.5).sample  # Heun's and Karras' timesteps are fractions
    assert 0 < relative(between, expected) < 0.5


def test_calls_do_not_disturb_one_another(artifact: Path) -> None:
    """Outputs are the caller's own: other calls at other timesteps and batch sizes leave them alone."""
    model, x = qe.load(artifact), normal(3, *SIZE)
    before = x.clone()
    first = model(x, 900).sample
    kept = first.clone()
    for timestep, batch in ((100, 3), (900, 1), (0, 2)):
        model(x[:batch], timestep)
    assert torch.equal(first, kept) and torch.equal(x, before)
    assert torch.equal(model(x, 900).sample, kept)
    first.zero_()  # an ordinary tensor, the caller's own
    assert first.is_contiguous()
    assert torch.equal(model(x, 900).sample, kept)
    assert torch.equal(model(x.contiguous(memory_format=torch.channels_last), 900).sample, kept)
    assert torch.equal(model(normal(6, *SIZE)[::2], 900).sample, model(normal(6, *SIZE)[::2].clone(), 900).sample)


X = normal(2, *SIZE)
WORDS = CASES["sd"].conditioning["encoder_hidden_states"]


@pytest.mark.parametrize(
    ("name", "sample", "timestep", "words", "error", "message"),
    [
        ("unet2d", X.long(), 5, {}, TypeError, "sample must be a floating-point tensor, got torch.int64"),
        ("unet2d", [1.0], 5, {}, TypeError, "sample must be a floating-point tensor, got list"),
        ("unet2d", X[0], 5, {}, ValueError, r"sample must be \[B, 3, 16, 16\], got \[3, 16, 16\]"),
        ("unet2d", X[:, :2], 5, {}, ValueError, r"sample must be .*, got \[2, 2, 16, 16\]"),
        ("unet2d", X[..., :8], 5, {}, ValueError, r"sample must be .*, got \[2, 3, 16, 8\]"),
        ("unet2d", X[:0], 5, {}, ValueError, r"sample must be .*, got \[0, 3, 16, 16\]"),
        ("unet2d", X / 0, 5, {}, ValueError, "sample holds NaN or infinity"),
        ("unet2d", X * float("nan"), 5, {}, ValueError, "sample holds NaN or infinity"),
        ("unet2d", X.to("meta"), 5, {}, ValueError, "sample is on meta, the model on cpu"),
        ("unet2d", X, 1000, {}, ValueError, "timestep must lie in the schedule, 0 to 999, got 1000"),
        ("unet2d", X, -1, {}, ValueError, "timestep must lie in the schedule"),
        ("unet2d", X, float("nan"), {}, ValueError, "timestep must lie in the schedule"),
        ("unet2d", X, torch.tensor([5, 6]), {}, ValueError, "timestep must hold one value"),
        ("unet2d", X, torch.tensor([[5]]), {}, ValueError, r"timestep must be a scalar, or 1-d .*\[1, 1\]"),
        ("unet2d", X, torch.tensor([]), {}, ValueError, "timestep must be a scalar, or 1-d"),
        ("unet2d", X, torch.tensor([5] * 3), {}, ValueError, r"1-d of length 1 or 2, got shape \[3\]"),
        ("unet2d", X, torch.tensor(True), {}, TypeError, "timestep must hold real numbers, got torch.bool"),
        ("unet2d", X, "5", {}, TypeError, "timestep must be a number or a tensor, got str"),
        ("unet2d", X, None, {}, TypeError, "timestep must be a number or a tensor, got NoneType"),
        ("unet2d", X, True, {}, TypeError, "timestep must be a number or a tensor, got bool"),
        ("unet2d", X, 5, {"class_labels": torch.tensor([1, 2])}, TypeError, "unknown 'class_labels'"),
        ("unet2d", X, 5, {"nonsense": 3}, TypeError, "unknown 'nonsense'"),
        ("class", X, 5, {}, TypeError, "missing 'class_labels'"),
        ("class", X, 5, {"class_labels": torch.tensor([1])}, ValueError, r"class_labels must be \[2\] .*, got \[1\]"),
        ("class", X, 5, {"class_labels": 3}, TypeError, "class_labels must be a tensor, got int"),
        ("class", X, 5, {"class_labels": torch.ones(2)}, TypeError, "class_labels must hold integers"),
        ("class", X, 5, {"class_labels": torch.tensor([1, 10])}, ValueError, r"class_labels must lie in \[0, 9\]"),
        ("sd", normal(2, 4, 8, 8), 5, {}, TypeError, "missing 'encoder_hidden_states'"),
        (
            "sd",
            normal(2, 4, 8, 8),
            5,
            {"encoder_hidden_states": WORDS[:, :, :9]},
            ValueError,
            r"encoder_hidden_states must be \[2, 7, 24\]",
        ),
        (
            "sd",
            normal(2, 4, 8, 8),
            5,
            {"encoder_hidden_states": WORDS / 0},
            ValueError,
            "encoder_hidden_states holds NaN or infinity",
        ),
    ],
)
def test_wrong_calls(name: str, sample: Any, timestep: Any, words: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        networks.integer_model(name)(sample, timestep, **words)


def test_missing_and_misspelt_nested_conditioning() -> None:
    model, x = networks.integer_model("sdxl"), normal(2, 4, 8, 8)
    given = networks.conditioning("sdxl", 2)
    nested = given["added_cond_kwargs"]
    with pytest.raises(TypeError, match="missing 'added_cond_kwargs_time_ids'"):
        model(x, 5, **{**given, "added_cond_kwargs": {"text_embeds": nested["text_embeds"]}})
    with pytest.raises(TypeError, match="unknown 'added_cond_kwargs_time_id'"):
        model(x, 5, **{**given, "added_cond_kwargs": {**nested, "time_id": nested["time_ids"]}})


def test_devices_and_backends_that_do_not_exist(artifact: Path) -> None:
    for device in ("meta", "nonsense"):
        with pytest.raises(ValueError, match=f"device must be 'cpu' or 'cuda', got '{device}'"):
            qe.load(artifact, device=device)
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:1"):
            with pytest.raises(ValueError, match=f"device '{device}' cannot be used: there is no NVIDIA GPU here"):
                qe.load(artifact, device=device)
    with pytest.raises(ValueError, match="backend must be one of onednn, native, torch.*got 'fast'"):
        qe.load(artifact, backend="fast")
    with pytest.raises(ValueError, match="cuda"):
        qe.load(artifact, backend="cuda")
