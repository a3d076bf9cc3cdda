"""Recipes: named, changed, saved, and checked field by field."""

from __future__ import annotations

import dataclasses

import pytest

import fxquant
from fxquant import Recipe


def test_named():
    assert Recipe.named("fast") is Recipe.FAST
    assert Recipe.named("standard") is Recipe.STANDARD
    own = Recipe(weight_p=2.0)
    assert Recipe.named(own) is own


@pytest.mark.parametrize("name", ["", "slow", None, 3, {}, []])
def test_unknown_name(name):
    with pytest.raises(fxquant.ConfigError, match=r"is not known. Use one of 'fast', 'standard'"):
        Recipe.named(name)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.FAST.weight_p = 2.0


def test_replace():
    changed = Recipe.FAST.replace(weight_p=2.0)
    assert (changed.weight_p, changed.name, Recipe.FAST.weight_p) == (2.0, "fast+", 2.4)
    assert changed.replace(percentile=0.99).name == "fast+"
    assert changed.replace(name="mine").name == "mine"
    with pytest.raises(fxquant.ConfigError, match=r"'weigth_p' is not known. .*did you mean 'weight_p'?"):
        Recipe.FAST.replace(weigth_p=2.0)


def test_stages_have_one_order():
    assert Recipe(stages=("cat", "ranges")).stages == ("ranges", "cat")
    assert Recipe(stages=["ranges"]).stages == ("ranges",)


@pytest.mark.parametrize("stages", ["bias", ("ranges", "learn"), (), ("bias", "cat")])
def test_stages_that_cannot_be_meant(stages):
    with pytest.raises(fxquant.ConfigError, match=r"^Recipe.stages: .* are not stages. Choose 'ranges' and any others of"):
        Recipe(stages=stages)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_range", "mse"),
        ("activation_range", ""),
        ("bias_gain", "all"),
        ("augment", "rotate"),
        ("weight_p", 0.5),
        ("weight_p", float("nan")),
        ("activation_p", "2.4"),
        ("percentile", 0.5),
        ("percentile", 1.5),
        ("cat_alpha", -0.1),
        ("cat_alpha", True),
        ("bias_images", 0),
        ("bias_images", 2.5),
        ("memory_gib", 0),
        ("cat_views", 0),
        ("cat_views", 2.0),
        ("cat_folds", 1),
        ("cat_clusters", 0),
        ("cat_pca", -1),
        ("weight_symmetric", "yes"),
        ("activation_symmetric", 1),
        ("name", None),
    ],
)
def test_values_that_cannot_be_meant(field, value):
    with pytest.raises(fxquant.ConfigError, match=rf"^Recipe\.{field}: .*\. (Use|Choose) "):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    "recipe", [Recipe.FAST, Recipe.STANDARD, Recipe(stages=("ranges",), weight_symmetric=True, name='a "b"\\ü', cat_alpha=1)]
)
def test_file_round_trip(tmp_path, recipe):
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    assert Recipe.load(str(tmp_path / "recipe.toml")) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_file_with_some_of_the_fields(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('# mine\nweight_range = "minmax"\ncat_views = 2\n', encoding="utf-8")
    assert Recipe.load(path) == Recipe(weight_range="minmax", cat_views=2)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"weight_p = ", r"is no TOML file: .*Write one .field = value. a line"),
        (b"\xff\xfe", "is no TOML file"),
        (b"weigth_p = 2", "'weigth_p' is not known. .*did you mean 'weight_p'"),
        (b"weight_p = 200", "Recipe.weight_p: 200 is no number from 1.0 to 10.0. Choose one"),
    ],
)
def test_files_that_are_none(tmp_path, content, match):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(fxquant.ConfigError, match=match):
        Recipe.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(fxquant.ConfigError, match=r"none\.toml: cannot be read: No such file or directory\. Check the path"):
        Recipe.load(tmp_path / "none.toml")
