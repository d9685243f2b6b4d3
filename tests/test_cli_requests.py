"""What commands are asked for and given: wrong requests, files of conditioning and of plans, samplers of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from commands import TINY, Run, loaded, refused

import qdiff_engine as qe
from qdiff_engine.calibration import calibration
from qdiff_engine.cli.correcting import check_samplers
from qdiff_engine.cli.options import make_sampler, read_conditioning, read_plan, scheduler_of


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nothing"], ["No such command", "--help"]),
        (["calibrate", "demo", "--steps", "0", "--out", "x"], ["--steps", "0"]),
        (["calibrate", "demo", "--samples", "-1", "--out", "x"], ["--samples"]),
        (["calibrate", "demo", "--steps", "1001", "--out", "x"], ["steps", "1000"]),
        (["calibrate", "demo", "--recipe", "w3a3", "--out", "x"], ["w3a3", "w4a8"]),
        (["calibrate", "demo", "--observer", "best", "--out", "x"], ["observer", "mse"]),
        (["calibrate", "demo", "--equalise", "maybe", "--out", "x"], ["--equalise", "off"]),
        (["calibrate", "demo", "--weights", "magic", "--out", "x"], ["weights", "nearest"]),
        (["calibrate", "demo", "--rows", "group:0", "--out", "x"], ["rows", "group:K"]),
        (["calibrate", "demo", "--edges", "a4", "--out", "x"], ["edges", "a16"]),
        (["calibrate", "demo", "--align", "accuquant", "--out", "x"], ["align", "accuquant:M"]),
        (["calibrate", "demo", "--align-pairs", "some", "--out", "x"], ["pairs must", "density:N"]),
        (["calibrate", "demo", "--align-batch", "0", "--out", "x"], ["--align-batch"]),
        (["calibrate", "demo", "--align-iterations", "5", "--out", "x"], ["--align-iterations", "--align accuquant:M"]),
        (["calibrate", "demo", *TINY, "--align", "accuquant:7", "--out", "x"], ["group", "6 steps", "7"]),
        (
            ["calibrate", "demo", *TINY, "--align", "accuquant:2", "--align-pairs", "density:13", "--out", "x"],
            ["pairs", "12", "13"],
        ),
        (["calibrate", "demo", "--learn-batch", "0", "--out", "x"], ["--learn-batch"]),
        (["calibrate", "demo", "--learn-pairs", "some", "--out", "x"], ["learn_pairs must", "density:N"]),
        (["calibrate", "demo", *TINY, "--learn-pairs", "density:13", "--out", "x"], ["--learn-pairs", "12 pairs"]),
        (["calibrate", "demo", "--plan", "none.json", "--out", "x"], ["none.json", "no such file"]),
        (["calibrate", "demo", "--plan", "budget:0.4", "--out", "x"], ["budget:0.4", "0.5 to 2"]),
        (["calibrate", "demo", "--plan", "preset:mnist", "--out", "x"], ["mnist", "imagenet-250"]),
        (["calibrate", "demo", "--plan", "snr:low", "--out", "x"], ["snr:low", "snr:THRESHOLD"]),
        (["compare", "x", "--reference", "demo", "--features", "magic"], ["magic", "package.module:name"]),
        (["compare", "x", "--reference", "demo", "--features", "no.such:thing"], ["no.such:thing", "importable"]),
        (["compare", "x", "--reference", "demo", "--features", "json:dumps"], ["json:dumps"]),
        (["calibrate", "demo", "--eta", "2", "--out", "x"], ["--eta"]),
        (["calibrate", "demo", "--eta", "0.5", "--sampler", "ddpm", "--out", "x"], ["eta", "DDPM"]),
        (["calibrate", "demo", "--guidance", "3", "--out", "x"], ["--guidance", "unconditional"]),
        (["calibrate", "demo", "--conditioning", "c.safetensors", "--out", "x"], ["c.safetensors", "no such file"]),
        (["calibrate", "demo", "--device", "tpu", "--out", "x"], ["tpu", "cpu"]),
        (["calibrate", "no-folder", "--out", "x"], ["no-folder", "no such folder"]),
        (["calibrate", "demo"], ["--out"]),
        (["calibrate", "demo", "--out", "/"], ["--out"]),
        (["calibrate", "demo", "--out", "/proc/nowhere/art"], ["/proc/nowhere"]),
        (["calibrate", "demo", "--correct", "magic", "--out", "x"], ["magic", "ptqd"]),
        (["inspect", "no-folder"], ["no-folder"]),
        (["sample", "no-folder", "--out", "x.png"], ["no-folder"]),
        (["sample", "no-folder", "--n", "0", "--out", "x.png"], ["--n"]),
        (["sample", "no-folder", "--out", "x.gif"], [".png"]),
        (["bops", "no-folder"], ["no-folder"]),
        (["bops", "demo", "--recipe", "w9"], ["w9"]),
        (["demo", "--out", "/proc/nowhere"], ["/proc/nowhere"]),
    ],
)
def test_wrong_requests(
    arguments: list[str], parts: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), *parts)
    refused(run(*arguments, "--json"), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_no_gpu(run: Run, artifact: Path) -> None:
    refused(run("sample", artifact, "--device", "cuda", "--out", "x.png"), "cuda", "0 CUDA GPUs", "--device cpu")


def test_out_is_never_somebody_elses(run: Run, artifact: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    refused(run("calibrate", "demo", *TINY, "--out", file), "file")
    refused(run("calibrate", "demo", *TINY, "--out", folder), "mine.txt")
    refused(run("calibrate", "demo", *TINY, "--out", file / "below"), str(file))
    refused(run("sample", artifact, "--out", folder / "mine.txt" / "x.png"), "mine.txt")
    refused(run("demo", "--out", file), "file")
    assert file.read_text() == (folder / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_is_no_artifact(run: Run, tmp_path: Path) -> None:
    refused(run("inspect", tmp_path), "missing")
    for name in ("config.json", "graph.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    refused(run("inspect", tmp_path), "config.json")
    refused(run("sample", tmp_path, "--out", tmp_path / "x.png"), "config.json")


def test_wrong_reference(run: Run, artifact: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1, **blocks
    )
    net.save_pretrained(tmp_path)
    refused(run("compare", artifact, "--reference", tmp_path, "--n", 1), "not the network", str(tmp_path))
    refused(run("bench", artifact, "--reference", tmp_path), "not the network")
    refused(run("bench", artifact, "--reference", "demo", "--compile"), "--compile needs --device cuda")
    refused(run("compare", artifact, "--reference", artifact, "--n", 1), str(artifact))
    refused(run("calibrate", tmp_path, "--out", tmp_path / "art"), "no scheduler")


def test_debug_shows_the_traceback(run: Run) -> None:
    status, _, error = run("inspect", "no-folder", "--debug")
    assert status == 1 and "Traceback" in error and error.splitlines()[-1].startswith("qdiff: ")


def test_conditioning_keys_nest_by_dots(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    one = torch.ones(1)
    safetensors.torch.save_file({"a.b": one, "c": one.clone(), "unconditional.c": one.clone()}, path)
    conditioning, unconditional = read_conditioning(path)
    assert conditioning == {"a": {"b": one}, "c": one} and unconditional == {"c": one}
    safetensors.torch.save_file({"a": one, "a.b": one.clone()}, path)
    with pytest.raises(ValueError, match="which is a tensor"):
        read_conditioning(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_conditioning(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A diffusers folder of a network that wants class labels; norms of one channel a group would remove them."""
    from diffusers import DDIMScheduler, UNet2DModel

    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "num_class_embeds": 3}
    torch.manual_seed(0)
    UNet2DModel(**sizes, block_out_channels=(64,), **blocks).save_pretrained(tmp_path / "m" / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "m" / "scheduler")
    return tmp_path / "m"


def test_conditioning_that_is_missing_is_named(run: Run, classes: Path, tmp_path: Path) -> None:
    target, labels = tmp_path / "art", tmp_path / "labels.safetensors"
    safetensors.torch.save_file({"class_labels": torch.tensor([2, 0])}, labels)
    refused(run("calibrate", classes, "--out", target), "class_labels", "--conditioning")
    loaded(run("calibrate", classes, *TINY, "--out", target, "--conditioning", labels, "--json"))
    refused(run("sample", target, "--out", tmp_path / "x.png"), "class_labels", "--conditioning")
    refused(run("bench", target), "class_labels", "--conditioning")
    data = loaded(run("compare", target, "--reference", classes, "--n", 3, "--conditioning", labels, "--json"))
    assert data["samples"] == 3 and data["psnr_db"] > 20
    assert loaded(run("bops", classes, "--recipe", "w8a8", "--json")) == loaded(run("bops", target, "--json"))


def test_samplers_that_a_correction_or_a_plan_is_not_for_are_refused_first(
    run: Run, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    labels, target = tmp_path / "labels.safetensors", tmp_path / "art"
    safetensors.torch.save_file({"class_labels": torch.tensor([2, 0])}, labels)
    EulerDiscreteScheduler().save_pretrained(classes / "scheduler")
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    arguments = ["calibrate", classes, *TINY, "--sampler", "folder", "--conditioning", labels, "--out", target]
    refused(run(*arguments, "--correct", "mmse+ibc"), "+ibc", "EulerDiscreteScheduler", "use 'mmse'")
    edm = EDMEulerScheduler()
    for recipe, correction in ((qe.Recipe(plan="snr"), "none"), (qe.Recipe(), "mmse")):
        with pytest.raises(ValueError, match="alphas_cumprod, which EDMEulerScheduler lacks"):
            check_samplers(recipe, correction, edm, 4)
    check_samplers(qe.Recipe(), "none", edm, 4)


def test_a_sampler_without_eta_samples_what_was_calibrated_with_some(run: Run, tmp_path: Path) -> None:
    art, out = tmp_path / "art", tmp_path / "x.safetensors"
    loaded(run("calibrate", "demo", *TINY, "--eta", "1", "--out", art, "--json"))
    refused(run("sample", art, "--eta", "0.5", "--sampler", "ddpm", "--out", out), "--eta", "DDPMScheduler")
    loaded(run("sample", art, "--n", 1, "--sampler", "ddpm", "--out", out, "--json"))
    model = qe.load(art)
    scheduler = make_sampler("ddpm", scheduler_of(model.key), str(art))
    assert torch.equal(safetensors.torch.load_file(out)["samples"], qe.sample(model, scheduler, (1, 1, 32, 32), 6, 0))


def test_guidance_from_calibration_to_images(run: Run, classes: Path, tmp_path: Path) -> None:
    """Both branches reach calibration, the images, the comparison and the clock, with the labels of the file."""
    from diffusers import UNet2DModel

    target, file, out = tmp_path / "art", tmp_path / "labels.safetensors", tmp_path / "x.safetensors"
    labels, none = torch.tensor([2, 0]), torch.tensor([1])
    safetensors.torch.save_file({"class_labels": labels, "unconditional.class_labels": none}, file)
    guided = ["--conditioning", file, "--guidance", "2.5"]
    loaded(run("calibrate", classes, *TINY, "--recipe", "w8a8", "--out", target, *guided, "--json"))
    model = qe.load(target)
    assert model.key["guidance_scale"] == 2.5

    loaded(run("sample", target, "--n", 4, "--steps", 6, "--seed", 1, "--out", out, *guided, "--json"))
    branches: dict[str, Any] = {"conditioning": {"class_labels": labels}, "unconditional": {"class_labels": none}}
    arguments: tuple[Any, ...] = (scheduler_of(model.key), (4, 1, 8, 8), 6, 1)
    expected = qe.sample(model, *arguments, guidance_scale=2.5, **branches)
    written = safetensors.torch.load_file(out)["samples"]
    assert torch.equal(written, expected)
    assert not torch.equal(written, qe.sample(model, *arguments, conditioning=branches["conditioning"]))

    compared = loaded(run("compare", target, "--reference", classes, "--n", 3, *guided, "--json"))
    unet = UNet2DModel.from_pretrained(classes, subfolder="unet")
    settings: dict[str, Any] = {"steps": 6, "samples": 3, "seed": 0, "guidance_scale": 2.5, **branches}
    assert compared["psnr_db"] == pytest.approx(qe.compare(model, unet, arguments[0], **settings).psnr_db)
    timed = loaded(run("bench", target, "--batch", 3, "--repetitions", 1, *guided, "--json"))
    assert (timed["batch"], timed["rows_per_call"]) == (3, 6)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nonsense", "not JSON"),
        ('["A8"]', "list of 2 rows, got 1 rows"),
        ('{"A8": 1}', "got dict"),
        ('["A8", 8]', "row 1 must name"),
        ('[{"timestep": 500, "mode": "A8"}, {"timestep": 1, "mode": "A4"}]', "row 1 must hold"),
    ],
)
def test_wrong_plans(plan: str, message: str, tmp_path: Path, demo_scheduler: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan)
    with pytest.raises(ValueError, match=message):
        read_plan(str(path), demo_scheduler, 2)


def test_a_plan_is_what_inspect_prints(tmp_path: Path, demo_scheduler: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text('[{"timestep": 500.0, "mode": "A16"}, {"timestep": 0.0, "mode": "A4"}]')
    assert read_plan(str(path), demo_scheduler, 2) == ("A16", "A4")
    path.write_text('["A8", "A4"]')
    assert read_plan(str(path), demo_scheduler, 2) == ("A8", "A4")


@pytest.mark.parametrize(
    "scheduler",
    [{}, {"class": "os.system"}, {"class": "UNet2DModel"}, {"class": "__doc__"}, {"class": ["DDIMScheduler"]}]
    + [{"class": "DDIMScheduler", "num_train_timesteps": n} for n in (0, 10**12, "x")],
)
def test_an_artifacts_scheduler_is_one_of_diffusers(scheduler: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="key.scheduler"):
        scheduler_of({"scheduler": scheduler})
