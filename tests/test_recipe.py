"""Recipes: names, fields, and messages that list what is valid."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from qdiff_engine.recipe import CHOICES, NAMED, Recipe


@pytest.mark.parametrize("name", NAMED)
def test_named_recipes_survive_json(name: str) -> None:
    recipe = Recipe.named(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    weights, activations = name.split("-")[0][1:].split("a")
    assert (recipe.weight_bits, recipe.activation_bits) == (int(weights), int(activations))


def test_changes_and_plans() -> None:
    recipe = Recipe.named("w4a8", plan=["A4", "A8", "A16"], rows="group:5")
    assert recipe.plan == ("A4", "A8", "A16") and recipe.row_group() == 5
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(recipe) == hash(dataclasses.replace(recipe))
    assert (Recipe(rows="step").row_group(), Recipe(rows="static").row_group()) == (1, 0)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted_and_listed(name: str) -> None:
    others = {"weights": "adaround"} if name == "step_sizes" else {}
    for value in CHOICES[name]:
        assert getattr(Recipe(**others, **{name: value}), name) == value
    with pytest.raises(ValueError, match=name) as caught:
        Recipe(**{name: "nonsense"})
    assert all(str(value) in str(caught.value) for value in CHOICES[name])


@pytest.mark.parametrize(
    "field,value",
    [
        ("weight_bits", 4.0),
        ("weight_bits", True),
        ("weight_bits", "4"),
        ("activation_bits", None),
        ("activation_bits", 3),
        ("weights", ["nearest"]),
        ("plan", "A8"),
        ("plan", ()),
        ("plan", ["A8", "A5"]),
        ("plan", [["A4"]]),
        ("plan", [None]),
        ("plan", {}),
        ("plan", 8),
        ("rows", "group"),
        ("rows", "group:0"),
        ("rows", "group:-1"),
        ("rows", "group:²"),
        ("rows", "group:٣"),
        ("rows", "group:" + "9" * 5000),
        ("rows", "groups:2"),
        ("rows", 3),
        ("rows", None),
        ("rows", ["step"]),
    ],
)
def test_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Recipe(**{field: value})


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'colour'.*weight_bits.*edges"):
        Recipe.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="w8a8, w4a8"):
        Recipe.named("w2a2")
