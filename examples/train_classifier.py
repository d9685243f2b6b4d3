"""Train the bundled digit classifier from MNIST's own files, and print its accuracy on the test images.

    python examples/train_classifier.py --data FOLDER --out model.safetensors

FOLDER holds MNIST's four IDX files, gzipped or not. An .npz works as well: `images` and `labels` of all 70,000 images,
the training set first, or Keras's `x_train`, `y_train`, `x_test` and `y_test`. The defaults are the settings of the
bundled weights: about two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import sys
from pathlib import Path

import numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from train_mnist import TRAINING_IMAGES, prepare, read_images

from qdiff_engine.digits import CLASSES, DigitClassifier

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IDX_LABELS_MAGIC = 2049

Digits = tuple[Tensor, Tensor]  # images float32 [n, 1, 32, 32] in [-1, 1], labels int64 [n]


def read_digits(path: Path) -> tuple[Digits, Digits]:
    """(training set, test set) of MNIST in a folder of IDX files or in an .npz.

    Raises:
        OSError: a file is missing. ValueError: a file holds something else.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    train, test = (
        _checked(read_images(_file(path, images), 10**9), torch.from_numpy(_read_labels(_file(path, labels))), path)
        for images, labels in FILES.values()
    )
    return train, test


def _file(folder: Path, name: str) -> Path:
    found = [folder / f"{name}{end}" for end in ("", ".gz") if (folder / f"{name}{end}").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: holds neither {name} nor {name}.gz; download MNIST there")
    return found[0]


def _read_labels(path: Path) -> numpy.ndarray:
    """IDX: big-endian magic and count as uint32, then a byte per label."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    magic, count = (int(v) for v in numpy.frombuffer(data[:8], dtype=">u4")) if len(data) >= 8 else (0, 0)
    if magic != IDX_LABELS_MAGIC or len(data) != 8 + count:
        raise ValueError(f"{path}: not an IDX file of labels; download it again")
    return numpy.frombuffer(data, dtype=numpy.uint8, offset=8).copy()


def _read_npz(path: Path) -> tuple[Digits, Digits]:
    with numpy.load(path, allow_pickle=False) as archive:
        if {"x_train", "y_train", "x_test", "y_test"} <= set(archive):
            parts = [(archive[f"x_{part}"], archive[f"y_{part}"]) for part in FILES]
        elif {"images", "labels"} <= set(archive):
            images, labels, n = archive["images"], archive["labels"], TRAINING_IMAGES
            parts = [(images[:n], labels[:n]), (images[n:], labels[n:])]
        else:
            raise ValueError(f"{path}: must hold 'images' and 'labels', or Keras's four arrays, got {sorted(archive)}")
    train, test = (_checked(torch.from_numpy(x.copy()), torch.from_numpy(y.copy()), path) for x, y in parts)
    return train, test


def _checked(images: Tensor, labels: Tensor, path: Path) -> Digits:
    if images.dtype != torch.uint8 or images.dim() != 3 or tuple(images.shape[1:]) != (28, 28) or not len(images):
        raise ValueError(f"{path}: images must be uint8 [N, 28, 28], got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or int(labels.max()) >= CLASSES:
        raise ValueError(f"{path}: labels must be {len(images)} digits, got {list(labels.shape)}")
    return prepare(images), labels.long()


def shifted(images: Tensor, generator: torch.Generator, by: int = 2) -> Tensor:
    """Every image moved by up to ``by`` pixels each way, as sampled digits are not centred like MNIST's."""
    padded = F.pad(images, (by, by, by, by), value=-1.0)
    rows, columns = torch.randint(0, 2 * by + 1, (2, len(images), 1), generator=generator)
    reach = torch.arange(images.shape[-1])
    i = torch.arange(len(images))[:, None, None]
    return padded[i, 0, (rows + reach)[:, :, None], (columns + reach)[:, None, :]][:, None]


def train(digits: Digits, epochs: int, batch: int, learning_rate: float, seed: int) -> DigitClassifier:
    """Cross-entropy with AdamW and a cosine schedule over ``epochs`` shuffles of the shifted training images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    images, labels = digits
    per_epoch = math.ceil(len(images) / batch)
    for epoch in range(epochs):
        total = 0.0
        for i, chosen in enumerate(torch.randperm(len(images), generator=generator).split(batch)):
            progress = (epoch * per_epoch + i) / (epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            loss = F.cross_entropy(model(shifted(images[chosen], generator))[1], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: loss {total / per_epoch:.4f}", file=sys.stderr, flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: DigitClassifier, digits: Digits) -> float:
    """Share of images whose largest logit is their label's."""
    images, labels = digits
    right = [model(x)[1].argmax(1) == y for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return float(torch.cat(right).double().mean())


def save(model: DigitClassifier, out: Path) -> None:
    """The weights in half precision, written beside ``out`` and swapped in."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    safetensors.torch.save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()}, temporary
    )
    os.replace(temporary, out)


def main(arguments: list[str] | None = None) -> int:
    """The command; an error is one line on standard error."""
    parser = argparse.ArgumentParser(description="Train the bundled digit classifier on MNIST.")
    parser.add_argument("--data", type=Path, required=True, help="MNIST: the folder of its IDX files, or an .npz")
    parser.add_argument("--out", type=Path, required=True, help="the new safetensors file")
    parser.add_argument("--epochs", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        if min(options.epochs, options.batch) < 1:
            raise ValueError("--epochs and --batch must be at least 1")
        training, test = read_digits(options.data)
        model = train(training, options.epochs, options.batch, options.learning_rate, options.seed)
        rounded = DigitClassifier().eval()
        save(model, options.out)
        rounded.load_state_dict(safetensors.torch.load_file(options.out))
        share, size = accuracy(rounded, test), options.out.stat().st_size
        print(f"{options.out}: right on {share:.2%} of {len(test[1])} test images, {size} bytes")
    except (OSError, ValueError) as error:
        print(f"train_classifier: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
