"""Which row serves a timestep, and which tables are refused."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_engine import numerics
from qdiff_engine.tables import Table, row_groups


def make_table(timesteps: tuple[float, ...] = (900.0, 500.0, 20.0), sites: tuple[str, ...] = ("a", "b")) -> Table:
    rows = len(timesteps)
    return Table(
        timesteps=timesteps,
        modes=("A8",) * rows,
        sites=sites,
        scale=torch.rand(rows, len(sites)) + 0.1,
        zero_point=torch.randint(-8, 8, (rows, len(sites)), dtype=torch.int32),
        bits=torch.full((rows, len(sites)), 8, dtype=torch.uint8),
        output_scale=torch.ones(rows, 3),
        output_shift=torch.zeros(rows, 3),
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=20, unique=True).map(lambda t: sorted(t, reverse=True)),
    st.floats(-100, 2100),
)
def test_row_is_the_nearest(timesteps: list[int], t: float) -> None:
    """Against the definition; halfway between two rows the smaller timestep is taken."""
    table = make_table(tuple(map(float, timesteps)), ())
    nearest = min(timesteps, key=lambda s: (abs(Fraction(t) - s), s))
    assert timesteps[table.row(t)] == nearest


def test_row_halfway_and_outside() -> None:
    table = make_table()
    assert [table.row(t) for t in (700, 700.5, 699.5, 260, 260.5)] == [1, 0, 1, 2, 1]
    assert [table.row(t) for t in (1e9, -5, 0, math.inf, -math.inf)] == [0, 2, 2, 0, 2]


TINY = torch.finfo(torch.float32).tiny
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"timesteps": ()}, "at least one"),
    "NaN timestep": ({"timesteps": (900.0, math.nan, 20.0)}, "finite"),
    "infinite timestep": ({"timesteps": (math.inf, 5.0, 2.0)}, "finite"),
    "ascending": ({"timesteps": (1.0, 2.0, 3.0)}, "descending"),
    "repeated": ({"timesteps": (3.0, 3.0, 1.0)}, "descending"),
    "mode": ({"modes": ("A8", "A8", "A5")}, "modes"),
    "too few modes": ({"modes": ("A8",)}, "modes"),
    "repeated site": ({"sites": ("a", "a")}, "distinct"),
    "rows of scale": ({"scale": torch.ones(2, 2)}, "scale must be"),
    "type of scale": ({"scale": torch.ones(3, 2).double()}, "scale must be"),
    "type of zero_point": ({"zero_point": torch.zeros(3, 2, dtype=torch.int64)}, "zero_point must be"),
    "sites of bits": ({"bits": torch.full((3, 1), 8, dtype=torch.uint8)}, "bits must be"),
    "bits": ({"bits": torch.full((3, 2), 5, dtype=torch.uint8)}, "bits must be 4, 8 or 16"),
    "NaN scale": ({"scale": torch.tensor([[1.0, math.nan]] * 3)}, "scale must be finite"),
    "infinite scale": ({"scale": torch.tensor([[1.0, math.inf]] * 3)}, "scale must be finite"),
    "zero scale": ({"scale": torch.tensor([[1.0, 0.0]] * 3)}, "scale must be finite"),
    "negative scale": ({"scale": torch.tensor([[1.0, -1.0]] * 3)}, "scale must be finite"),
    "scale without an inverse": ({"scale": torch.tensor([[1.0, TINY / 8]] * 3)}, "scale must be finite"),
    "zero point": ({"zero_point": torch.full((3, 2), 128, dtype=torch.int32)}, r"\[-128, 127\]"),
    "zero point below": ({"zero_point": torch.full((3, 2), -129, dtype=torch.int32)}, r"\[-128, 127\]"),
    "rank of output_scale": ({"output_scale": torch.ones(3)}, "output_scale must be"),
    "rows of output_shift": ({"output_shift": torch.zeros(2, 3)}, "output_shift must be"),
    "NaN output_shift": ({"output_shift": torch.full((3, 3), math.nan)}, "output_shift must be finite"),
    "channels differ": ({"output_shift": torch.zeros(3, 4)}, "shape of output_scale"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_table(), **changes)


def test_zero_point_range_follows_the_bits() -> None:
    """At 4 bits -8..7; a site that stays floating has no range."""
    table = make_table(sites=("a", "b", "c"))
    bits = torch.tensor([[4, 8, 16]] * 3, dtype=torch.uint8)
    dataclasses.replace(table, bits=bits, zero_point=torch.tensor([[-8, -128, 999]] * 3, dtype=torch.int32))
    for wrong in ([8, 0, 0], [-9, 0, 0], [0, 128, 0]):
        with pytest.raises(ValueError, match="zero_point must lie"):
            dataclasses.replace(table, bits=bits, zero_point=torch.tensor([wrong] * 3, dtype=torch.int32))


def test_the_smallest_scale_has_a_finite_inverse() -> None:
    table = dataclasses.replace(make_table(), scale=torch.full((3, 2), TINY))
    assert math.isfinite(numerics.inverse_scale(float(table.scale[0, 0])))


def test_rows_that_share_a_range_are_neighbours_in_one_mode() -> None:
    assert row_groups(("A4",) * 4, 1) == [1, 2, 3, 4]
    assert row_groups(("A4",) * 4, 0) == [1, 1, 1, 1]
    assert row_groups(("A8", "A4", "A4", "A8", "A8"), 2) == [1, 2, 3, 4, 5]
    assert row_groups(("A8", "A4", "A8", "A8"), 3) == [1, 2, 1, 3]
