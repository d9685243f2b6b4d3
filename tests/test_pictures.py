"""What is drawn: the right image at the right place, with the right brightness."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
from PIL import Image

from qdiff_engine.pictures import grid, labelled_rows, pixels


def test_pixels_of_the_whole_range() -> None:
    values = torch.tensor([-7.0, -1.0, -0.5, 0.0, 1.0, 9.0, float("nan")]).reshape(1, 1, 1, 7)
    assert pixels(values).flatten().tolist() == [0, 0, 64, 128, 255, 255, 0]
    with pytest.raises(ValueError, match=r"images must be \[n, 1 or 3, H, W\], got \[1, 2, 4, 4\]"):
        pixels(torch.zeros(1, 2, 4, 4))


def test_a_grid_shows_its_images_in_reading_order() -> None:
    images = torch.stack([torch.full((1, 64, 64), value) for value in (-1.0, 0.0, 1.0)])
    picture = numpy.asarray(Image.open(io.BytesIO(grid(images, columns=2))))
    height, width = picture.shape
    quarters = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    shown = [int(picture[place]) for place in quarters]
    background = int(picture[0, 0])
    assert shown == [0, 128, 255, background]


def test_colours_keep_their_channels() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    picture = numpy.asarray(Image.open(io.BytesIO(grid(red))))
    assert picture[picture.shape[0] // 2, picture.shape[1] // 2].tolist() == [255, 0, 0]


def test_labelled_rows_are_stacked_in_their_order() -> None:
    rows = {"dark": torch.full((2, 1, 16, 16), -1.0), "light": torch.full((2, 1, 16, 16), 0.99)}
    picture = numpy.asarray(Image.open(io.BytesIO(labelled_rows(rows, "two rows"))).convert("L")).astype(int)
    dark, _ = numpy.nonzero(picture[:, picture.shape[1] // 2 :] < 5)  # right of all labels
    assert len(dark) > 1000 and dark.max() < 0.6 * picture.shape[0], "the dark row is the upper one"
