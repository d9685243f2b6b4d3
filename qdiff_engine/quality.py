"""How good images are, and how alike two sets of them: SSIM, the Fréchet distance of features, classes seen in them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# images [n, C, H, W] -> features [n, F], or (features, logits [n, classes])
Extractor = Callable[[Tensor], Any]

PIXEL_PEAK = 2.0  # images live in [-1, 1]
TRUSTED_RATIO = 10  # samples per feature below which a Fréchet distance is called rough
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def structural_similarity(images: Tensor, reference: Tensor, pixels: bool = True) -> list[float]:
    """SSIM = mean of (2 m m' + c1)(2 cov + c2) / ((m² + m'² + c1)(v + v' + c2)) of every image, c = (0.01 L, 0.03 L)².

    Moments under a Gaussian window of 11 pixels (sigma 1.5; of the largest odd size that fits where an image is
    smaller), where it lies inside the image, averaged over places and channels (Wang et al. 2004).

    Args:
        images, reference: [n, C, H, W]; pixels are clamped to [-1, 1] and have L = 2, latents the range of
            ``reference``.

    Raises:
        ValueError: shapes that differ.
    """
    if images.shape != reference.shape or images.dim() != 4:
        raise ValueError(
            f"images must be [n, C, H, W] with the shape {list(reference.shape)} of the reference, "
            f"got {list(images.shape)}"
        )
    x, y = images.double(), reference.double()
    peak = PIXEL_PEAK if pixels else max(float(y.max() - y.min()), torch.finfo(torch.float32).tiny)
    if pixels:
        x, y = x.clamp(-1, 1), y.clamp(-1, 1)
    window = _gaussian_window(min(_WINDOW, *x.shape[2:])).expand(x.shape[1], 1, -1, -1)

    def mean(value: Tensor) -> Tensor:
        return F.conv2d(value, window, groups=value.shape[1])

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    similarity = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1).tolist()


def _gaussian_window(size: int) -> Tensor:
    """float64 [1, 1, size, size] that sums to one, for the largest odd size up to ``size``."""
    size -= 1 - size % 2
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-axis.square() / (2 * _SIGMA**2))
    return (torch.outer(kernel, kernel) / kernel.sum() ** 2)[None, None]


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """d² = |m - m'|² + tr(S + S' - 2 (S S')^(1/2)) between Gaussians fitted to features x [n, F] and y [n', F].

    The trace of the root is the nuclear norm of R R'^T with S = R^T R from a QR factorisation of the centred
    features, all in float64: no square root of a matrix that is nearly singular. In squared units of the features;
    comparable only with distances of the same extractor and the same number of samples: two independent draws of n
    from one distribution are about (F + 5) / (2 n) of the features' total variance apart, 5 % at n = 10 F.
    Source: Fréchet 1957; Dowson and Landau 1982.

    Raises:
        ValueError: not two matrices of the same width, values that are not finite, or no more samples than features
            (n <= F), whose covariance is singular.

    Warns:
        UserWarning: fewer than 10 samples per feature.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(f"features must be [n, F] twice, got {list(x.shape)} and {list(y.shape)}")
    if trouble := too_few(min(len(x), len(y)), x.shape[1]):
        raise ValueError(trouble)
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("features hold NaN or infinity")
    if remark := rough(min(len(x), len(y)), x.shape[1]):
        warnings.warn(remark, UserWarning, stacklevel=2)
    (mean_x, root_x), (mean_y, root_y) = _gaussian(x), _gaussian(y)
    between = torch.linalg.svdvals(root_x @ root_y.T).sum()
    spread = root_x.square().sum() + root_y.square().sum()
    return max(0.0, float((mean_x - mean_y).square().sum() + spread - 2 * between))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [F], R [F, F] with covariance R^T R) in float64."""
    values = features.double().cpu()
    mean = values.mean(0)
    return mean, torch.linalg.qr((values - mean) / math.sqrt(len(values) - 1), mode="r").R


def too_few(samples: int, features: int) -> str | None:
    """Why a Fréchet distance cannot be taken: it needs more samples than features."""
    if samples > max(features, 1):
        return None
    return f"a Fréchet distance of {features} features needs more than {max(features, 1)} samples, got {samples}"


def rough(samples: int, features: int) -> str | None:
    """What to mind where a Fréchet distance is taken of few samples."""
    if samples >= TRUSTED_RATIO * features:
        return None
    return (
        f"a Fréchet distance of {features} features is rough below {TRUSTED_RATIO * features} samples, got {samples}: "
        "compare it only with others of as many samples"
    )


@dataclass(frozen=True)
class Perception:
    """What an extractor sees in a model's images beside the float ones of the same seeds.

    Args:
        frechet_to_float: Fréchet distance between the two sets of features; None where it cannot be taken.
        frechet_note: why it cannot, or why it is rough; None otherwise.
        class_accuracy: share of images whose most likely class is that of the float image; None without logits.
        class_entropy, class_entropy_float: mean over images of the entropy of p(class | image), in nats: how
            doubtful the images are.
        class_diversity, class_diversity_float: entropy of the mean p(class), in nats: how varied the set is.
    """

    frechet_to_float: float | None
    frechet_note: str | None
    class_accuracy: float | None = None
    class_entropy: float | None = None
    class_entropy_float: float | None = None
    class_diversity: float | None = None
    class_diversity_float: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def perceive(extractor: Extractor, images: Tensor, reference: Tensor, pixels: bool = True) -> Perception:
    """The `Perception` of ``images`` [n, C, H, W] beside ``reference``, images of the same seeds.

    Args:
        extractor: any module that maps images to features [n, F], or to (features, logits [n, classes]); pixels are
            clamped to [-1, 1] before it sees them.

    Raises:
        ValueError: an extractor that returns something else, or images that are not finite.
    """
    x, logits = extract(extractor, images, pixels)
    y, reference_logits = extract(extractor, reference, pixels)
    note = too_few(len(x), x.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the note says it
        distance = None if note else frechet_distance(x, y)
    note = note or rough(len(x), x.shape[1])
    if logits is None or reference_logits is None:
        return Perception(distance, note)
    same = logits.argmax(1) == reference_logits.argmax(1)
    return Perception(
        distance,
        note,
        float(same.double().mean()),
        *(value for measure in (class_entropy, class_diversity) for value in map(measure, (logits, reference_logits))),
    )


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, pixels: bool = True, batch: int = 64) -> tuple[Tensor, Tensor | None]:
    """(features [n, F], logits [n, classes] or None), float64 on the CPU; ``batch`` images a call.

    Features of more than two dimensions are flattened. A module is asked on its parameters' device.
    """
    device = next((p.device for p in getattr(extractor, "parameters", lambda: iter(()))()), images.device)
    values = images.float().clamp(-1, 1) if pixels else images.float()
    features, logits = [], []
    for part in values.split(batch):
        output = extractor(part.to(device))
        first, second = output if isinstance(output, tuple | list) and len(output) == 2 else (output, None)
        for name, value in (("features", first), ("logits", second)):
            wrong = not isinstance(value, Tensor) or value.dim() < 2 or len(value) != len(part)
            if wrong and (name == "features" or value is not None):
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the extractor must return {name} [{len(part)}, ...] for as many images, got {found}")
        features.append(first.flatten(1).double().cpu())
        if second is not None:
            logits.append(second.flatten(1).double().cpu())
    return torch.cat(features), torch.cat(logits) if logits else None


def class_entropy(logits: Tensor) -> float:
    """Mean over n of H(softmax(logits[n])) in nats; logits [n, classes]."""
    return float(_entropy(logits.double().softmax(1)).mean())


def class_diversity(logits: Tensor) -> float:
    """H(mean over n of softmax(logits[n])) in nats; log(classes) for a set with as many of each."""
    return float(_entropy(logits.double().softmax(1).mean(0)))


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
