"""The bundled digit classifier: the feature extractor behind the bundled model's Fréchet distance and class figures."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent / "data" / "mnist32-classifier" / "model.safetensors"
FEATURES = 32
CLASSES = 10


class DigitClassifier(nn.Module):
    """(features [n, 32], logits [n, 10]) of images [n, 1, 32, 32] in [-1, 1]; 0.06M parameters.

    Three convolutions, each halving the image, then two linear layers; the features are what the last one reads, and
    pass through no ReLU, so that a Gaussian fits them better.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.features = nn.Linear(64 * 4 * 4, FEATURES)
        self.classes = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits.

        Raises:
            ValueError: images of another shape.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (1, 32, 32):
            raise ValueError(f"images must be [n, 1, 32, 32], got {list(images.shape)}")
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        features = self.features(x.flatten(1))
        return features, self.classes(F.relu(features))


def digit_classifier() -> DigitClassifier:
    """The bundled classifier with its trained weights, in float32 and eval mode (99.12 % of MNIST's test images)."""
    with torch.random.fork_rng(devices=[]):
        model = DigitClassifier()
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS))  # stored in half precision
    return model.float().eval()
