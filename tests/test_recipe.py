"""Recipes: named, changed, saved, and checked field by field."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

import fxquant
from fxquant import Recipe
from fxquant.errors import listed
from fxquant.passes.finish_network import finish_settings, output_kl_settings
from fxquant.passes.reconstruct_units import scales_settings, unit_settings
from fxquant.recipe import PRESETS, STAGES
from fxquant.recipe_values import NUMBERS, WORDS
from fxquant.reconstruction.network import NetworkSettings
from fxquant.reconstruction.unit import UnitSettings

TRUTHS = [field.name for field in dataclasses.fields(Recipe) if field.type == "bool"]


FINISH = {
    "iterations": 11,
    "temperature": 3.0,
    "warmup": 0.3,
    "feature_weight": 5.0,
    "mix": 0.25,
    "mix_until": 0.4,
    "checks": 7,
    "averaging": 0.9,
    "match": False,
    "margin": 1.5,
    "holdout_temperature": 2.5,
    "match_images": 33,
}
"""Values that no default has."""


def test_named():
    assert Recipe.named("fast") is Recipe.FAST
    assert Recipe.named("standard") is Recipe.STANDARD
    own = Recipe(weight_p=2.0)
    assert Recipe.named(own) is own


def test_names():
    names = "fast standard best finish adaround brecq qdrop pdquant genie packptq erq output_kl"
    assert set(PRESETS) == set(names.split())
    for name, recipe in PRESETS.items():
        assert Recipe.named(name) is recipe is getattr(Recipe, name.upper())
        assert recipe.name == name
    assert len({recipe.replace(name="") for recipe in PRESETS.values()}) == len(PRESETS)


def test_published_constants():
    learned = {name: set(recipe.stages) - {"ranges", "bias", "cat"} for name, recipe in PRESETS.items()}
    assert learned.pop("fast") == set()
    assert learned.pop("erq") == {"reparameterize", "erq"}
    assert learned.pop("brecq") == {"units", "scales"}
    assert [learned.pop(name) for name in ("output_kl", "finish")] == [{"output_kl"}, {"finish"}]
    assert all("finish" in learned.pop(name) for name in ("standard", "best"))
    assert set(learned) == {"adaround", "qdrop", "pdquant", "genie", "packptq"}
    assert all(stages == {"units"} for stages in learned.values())
    assert {PRESETS[name].unit_iterations for name in (*learned, "brecq")} == {20_000}
    assert (Recipe.QDROP.unit_drop, Recipe.QDROP.unit_input_drop, Recipe.QDROP.unit_granularity) == (0.5, 0.5, "block")
    assert (Recipe.QDROP.unit_rounding_weight, Recipe.QDROP.unit_warmup) == (0.01, 0.2)
    assert (Recipe.QDROP.unit_beta_start, Recipe.QDROP.unit_beta_end) == (20, 2)
    assert (Recipe.ADAROUND.unit_granularity, Recipe.ADAROUND.unit_activations, Recipe.BRECQ.unit_activations) == ("layer", False, False)
    assert (Recipe.PDQUANT.unit_kl_weight, Recipe.PDQUANT.unit_correction_iterations) == (10, 500)
    assert (Recipe.GENIE.unit_scale_rate, Recipe.QDROP.unit_scale_rate) == (1e-4, 0)
    assert Recipe.PACKPTQ.unit_granularity == "pack"


QDROP = UnitSettings(
    iterations=20_000,
    batch=32,
    rounding_rate=1e-3,
    rounding_weight=0.01,
    beta=(20.0, 2.0),
    warmup=0.2,
    activation_rate=4e-5,
    drop=0.5,
    input_drop=0.5,
)


@pytest.mark.parametrize(
    ("recipe", "differs"),
    [
        ("qdrop", {}),
        ("adaround", {"activations": False, "input_drop": 0.0, "beta_shape": "cosine"}),
        ("brecq", {"activations": False, "input_drop": 0.0}),
        ("pdquant", {"rounding_rate": 3e-3, "kl_weight": 10.0, "kl_temperature": 4.0}),
        ("genie", {"scale_rate": 1e-4, "rounding_weight": 1.0, "sampling": "epochs"}),
        ("packptq", {"batch": 16, "rounding_rate": 3e-3}),
    ],
)
def test_published_constants_reach_the_loop_over_units(recipe, differs):
    assert unit_settings(PRESETS[recipe]) == dataclasses.replace(QDROP, **differs)


def test_published_constants_beside_that_loop():
    assert scales_settings(Recipe.BRECQ) == UnitSettings(iterations=5000, batch=32, activation_rate=4e-4, p=2.4)
    assert (Recipe.PDQUANT.unit_correction_rate, Recipe.PDQUANT.unit_correction_pull, Recipe.PDQUANT.unit_ranges) == (1e-3, 50, "prefix")
    assert (Recipe.GENIE.activation_symmetric, Recipe.QDROP.activation_symmetric) == (True, False)
    assert {recipe.weight_p for recipe in PRESETS.values()} == {2.4}


def test_published_recipes_count_every_value_alike_where_ranges_of_activations_are_chosen():
    published = {"adaround", "brecq", "qdrop", "pdquant", "genie", "packptq", "erq", "output_kl"}
    for name, recipe in PRESETS.items():
        expected = (2.4, "absolute") if name in published else (2.0, "relative")
        assert (recipe.activation_p, recipe.activation_error) == expected


def test_every_constant_of_the_network_wise_stages_comes_from_the_recipe():
    """Fields are found by name, so one that was renamed would fall back to its default without a word."""
    words = {"precision": "bfloat16", "compile": True}
    assert {name: getattr(Recipe(), f"finish_{name}") for name in FINISH}.items().isdisjoint(FINISH.items())
    changed = Recipe(**words, **{f"finish_{name}": value for name, value in FINISH.items()})
    assert finish_settings(changed) == NetworkSettings(kl_weight=9.0, **FINISH, **words)
    assert finish_settings(Recipe()).match and not output_kl_settings(Recipe()).match
    changed = Recipe(**words, finish_checks=7, output_kl_iterations=11, output_kl_temperature=3.0, output_kl_penalty=0.7)
    wanted = NetworkSettings(iterations=11, temperature=3.0, penalty=0.7, checks=7, margin=0.0, holdout_temperature=3.0, **words)
    assert output_kl_settings(changed) == wanted


UNITS = {
    "iterations": 11,
    "batch": 5,
    "sampling": "epochs",
    "rounding_rate": 0.02,
    "rounding_weight": 0.3,
    "beta_shape": "cosine",
    "warmup": 0.35,
    "activations": False,
    "activation_rate": 0.04,
    "scale_rate": 0.05,
    "bias_rate": 0.06,
    "drop": 0.7,
    "input_drop": 0.8,
    "fisher": "full",
    "kl_weight": 9.0,
    "kl_temperature": 3.0,
}


def test_every_constant_of_the_unit_wise_stages_comes_from_the_recipe():
    recipe = Recipe(
        precision="bfloat16", unit_beta_start=30.0, unit_beta_end=3.0, **{f"unit_{name}": value for name, value in UNITS.items()}
    )
    found = dataclasses.asdict(unit_settings(recipe))
    assert found == {**UNITS, "beta": (30.0, 3.0), "precision": "bfloat16", "p": 2.0}  # p is of the stage "scales" alone
    assert dataclasses.asdict(unit_settings(Recipe())).items().isdisjoint(UNITS.items())


@pytest.mark.parametrize("name", ["", "slow", None, 3, {}, []])
def test_unknown_name(name):
    with pytest.raises(fxquant.ConfigError, match=re.escape(f"is not known. Use one of {listed(PRESETS)}")):
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


@pytest.mark.parametrize("stages", [("ranges",), ("ranges", "reparameterize"), ("ranges", "erq")])
def test_two_grids_without_the_stages_that_make_them(stages):
    words = r"'dual' changes nothing without the stage '(erq|reparameterize)'"
    with pytest.raises(fxquant.ConfigError, match=rf"^Recipe\.weight_groups: {words}.*Recipe\.ERQ"):
        Recipe(stages=stages, weight_groups="dual")


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
        ("unit_granularity", "stage"),
        ("unit_activations", 1),
        ("unit_iterations", 1e3),
        ("unit_batch", 0),
        ("unit_beta_end", 0),
        ("pack_length", 0),
        ("cache_dtype", "float16"),
        ("precision", "half"),
        ("finish_checks", 0),
        ("finish_iterations", -1),
        ("finish_holdout", 1.0),
        ("finish_averaging", 1.0),
        ("finish_temperature", 0),
        ("finish_weight_rate", float("inf")),
    ],
)
def test_values_that_cannot_be_meant(field, value):
    with pytest.raises(fxquant.ConfigError, match=rf"^Recipe\.{field}: .*\. (Use|Choose) "):
        Recipe(**{field: value})


def test_every_field_is_checked():
    assert {field.name for field in dataclasses.fields(Recipe)} == {"name", "stages", *TRUTHS, *WORDS, *NUMBERS}


@pytest.mark.parametrize("field", WORDS)
def test_words(field):
    for word in WORDS[field]:
        assert getattr(Recipe(stages=Recipe.ERQ.stages, **{field: word}), field) == word
    for wrong in ("", WORDS[field][0].upper(), None, 1, WORDS[field], True):
        with pytest.raises(fxquant.ConfigError, match=rf"^Recipe\.{field}: .* is not known. Use one of {re.escape(listed(WORDS[field]))}"):
            Recipe(**{field: wrong})


@pytest.mark.parametrize("field", NUMBERS)
def test_numbers(field):
    low, high = NUMBERS[field]
    for number in (low, high):
        assert getattr(Recipe(**{field: number}), field) == number
    whole = isinstance(low, int)
    for wrong in (low - 1, high + max(1, high), "1", None, True, float("nan"), float("inf"), [low], *([low + 0.5] if whole else [])):
        with pytest.raises(
            fxquant.ConfigError, match=rf"^Recipe\.{field}: .* is no {'whole ' if whole else ''}number from .*\. Choose one"
        ):
            Recipe(**{field: wrong})


@pytest.mark.parametrize("field", TRUTHS)
def test_truths(field):
    for wrong in (0, 1, "true", None):
        with pytest.raises(fxquant.ConfigError, match=rf"^Recipe\.{field}: .* is no truth value. Use True or False"):
            Recipe(**{field: wrong})


def test_a_learning_recipe_of_ones_own():
    own = Recipe(stages=("finish", "scales", "output_kl", "units", "ranges"), unit_iterations=0)
    assert own.stages == ("ranges", "units", "scales", "output_kl", "finish")
    assert set(own.stages) < set(STAGES)


@pytest.mark.parametrize(
    "recipe",
    [
        *PRESETS.values(),
        Recipe.QDROP.replace(unit_iterations=1000, unit_activation_rate=1e-5),
        Recipe(stages=("ranges",), weight_symmetric=True, name='a "b"\\ü', cat_alpha=1),
    ],
)
def test_file_round_trip(tmp_path, recipe):
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    assert Recipe.load(str(tmp_path / "recipe.toml")) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


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
