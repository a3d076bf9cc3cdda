"""What the words of the command line stand for: bits, counts, recipes, overrides, and files that can be written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fxquant.errors import ConfigError
from fxquant.recipe import Recipe


def bits(word: str) -> int | None:
    """Return ``"4"`` as 4 and ``"float"`` as None; the library checks the range."""
    return None if word == "float" else int(word)


def positive(word: str) -> int:
    """Return a whole number above 0."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not positive")
    return number


def read_recipe(word: str) -> Recipe:
    """Return a recipe by name, or from a TOML file."""
    if not word.endswith(".toml"):
        return Recipe.named(word)
    if not Path(word).is_file():
        raise ConfigError("is no file", where=word, fix="Check the path of the recipe")
    return Recipe.load(word)


def read_overrides(words: Sequence[str]) -> dict[str, dict[str, int | None]]:
    """Return ``["layer4.*:w=4,a=float"]`` as ``{"layer4.*": {"w": 4, "a": None}}``."""
    overrides: dict[str, dict[str, int | None]] = {}
    for word in words:
        glob, _, pairs = word.rpartition(":")
        try:
            changes = {key: bits(value) for key, value in (pair.split("=") for pair in pairs.split(","))}
        except ValueError:
            changes = {}
        if not glob or not changes or not changes.keys() <= {"w", "a"}:
            raise ConfigError(
                f"{word!r} is no override", where="--override", fix="Write GLOB:w=BITS,a=BITS, for example 'layer4.*:w=4,a=8'"
            )
        overrides[glob] = changes
    return overrides


def check_target(out: str) -> None:
    """Say now what would otherwise be said after all the work."""
    if not Path(out).resolve().parent.is_dir():
        raise ConfigError("its folder does not exist", where=out, fix="Make it first")
