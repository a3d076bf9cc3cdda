"""Recipe: every constant of a quantization run, in one frozen object that can be read, changed, saved and compared."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fxquant.errors import ConfigError, one_of

STAGES = ("ranges", "bias", "cat")
"""What a recipe can do, in the order it is done: choose ranges, correct biases, append CAT.

A stage that learns (rounding, scales, the whole network) belongs behind the ranges; it gets its name here and its constants in `Recipe`.
"""


@dataclass(frozen=True)
class Recipe:
    """All constants of a run.

    ``Recipe.FAST`` and ``Recipe.STANDARD`` are the named ones; ``Recipe.FAST.replace(weight_p=2.0)`` changes a field.

    Raises:
        ConfigError: a field with a value that cannot be meant, by name, with what to write instead.
    """

    name: str = "custom"
    stages: tuple[str, ...] = STAGES
    """Which stages run, ``"ranges"`` and any of the others of `STAGES`; the order is fixed."""

    weight_range: str = "lp"
    """Range estimator of weights, per output channel: ``"lp"``, ``"minmax"``, ``"percentile"``, ``"kl"``."""
    weight_p: float = 2.4
    """Exponent of the L_p search for weights (LAPQ; 2.4 as in BRECQ, QDrop and PD-Quant)."""
    weight_symmetric: bool = False
    """Signed weights with zero-point 0 instead of a zero-point per channel."""
    activation_range: str = "lp"
    """Range estimator of activations, per tensor."""
    activation_p: float = 2.4
    activation_symmetric: bool = False
    percentile: float = 0.9999
    """Share of values inside the range for the estimator ``"percentile"``."""

    bias_images: int = 256
    """Images for bias correction; fewer are taken when their activations do not fit into `memory_gib`."""
    bias_gain: str = "balanced"
    """What is done about the spread of each output channel along with its mean: ``"none"``, ``"spread"``, ``"regression"`` or
    ``"balanced"`` (see `fxquant.passes.CorrectBias`)."""
    memory_gib: float = 2.0
    """Budget for activations held at once while correcting biases, in GiB."""

    augment: str = "crop"
    """How fresh views of the calibration images are made when the loader has no randomness of its own: ``"none"``, ``"crop"`` (shift by
    up to an eighth of the image), ``"crop+flip"``."""
    cat_views: int = 4
    """Fresh views of each calibration image that CAT is fitted on."""
    cat_folds: int = 4
    """Folds of the cross-validation that chooses CAT's fit, clusters, PCA dimension and alpha."""
    cat_clusters: int = 64
    """Clusters with ``cat="paper"`` (CAT, Table 2)."""
    cat_pca: int = 50
    """PCA dimension with ``cat="paper"``."""
    cat_alpha: float = 0.4
    """Blend with ``cat="paper"``."""

    FAST: ClassVar[Recipe]
    STANDARD: ClassVar[Recipe]

    def __post_init__(self) -> None:
        if isinstance(self.stages, str) or not set(self.stages) <= set(STAGES) or "ranges" not in self.stages:
            raise ConfigError(f"{self.stages!r} are not stages", where="Recipe.stages", fix=f"Choose 'ranges' and any others of {STAGES}")
        object.__setattr__(self, "stages", tuple(stage for stage in STAGES if stage in self.stages))
        for name in ("weight_range", "activation_range"):
            _one_of(f"Recipe.{name}", getattr(self, name), ("lp", "minmax", "percentile", "kl"))
        _one_of("Recipe.bias_gain", self.bias_gain, ("none", "spread", "regression", "balanced"))
        _one_of("Recipe.augment", self.augment, ("none", "crop", "crop+flip"))
        for name, low, high in (
            ("weight_p", 1.0, 10.0),
            ("activation_p", 1.0, 10.0),
            ("percentile", 0.501, 1.0),
            ("cat_alpha", 0.0, 1.0),
            ("memory_gib", 0.001, 10_000.0),
            ("bias_images", 1, 10**9),
            ("cat_views", 1, 1000),
            ("cat_folds", 2, 100),
            ("cat_clusters", 1, 10**6),
            ("cat_pca", 0, 10**6),
        ):
            value, kinds = getattr(self, name), int if isinstance(low, int) else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "whole number" if kinds is int else "number"
                raise ConfigError(f"{value!r} is no {what} from {low} to {high}", where=f"Recipe.{name}", fix="Choose one")
        for name in ("weight_symmetric", "activation_symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{getattr(self, name)!r} is no truth value", where=f"Recipe.{name}", fix="Use True or False")
        if not isinstance(self.name, str):
            raise ConfigError(f"{self.name!r} is no name", where="Recipe.name", fix="Use a string")

    @classmethod
    def named(cls, recipe: str | Recipe) -> Recipe:
        """Return the recipe called `recipe` (``"fast"``, ``"standard"``), or `recipe` itself."""
        if isinstance(recipe, Recipe):
            return recipe
        presets = {preset.name: preset for preset in (cls.FAST, cls.STANDARD)}
        _one_of("recipe", recipe, tuple(presets))
        return presets[recipe]

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed; its name gets a ``+`` behind it unless a new one is given."""
        _known(changes)
        return dataclasses.replace(self, **{"name": self.name.rstrip("+") + "+", **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-able values."""
        return {**dataclasses.asdict(self), "stages": list(self.stages)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """Return the recipe with these fields; missing ones take their default, unknown ones are an error with the nearest name."""
        _known(fields)
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write all fields to a TOML file."""
        lines = (f"{name} = {json.dumps(value)}\n" for name, value in self.to_dict().items())
        Path(path).write_text("".join(lines), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a TOML file with any of the fields.

        Raises:
            ConfigError: the file is missing, is no TOML, or holds an unknown field or a value that cannot be meant.
        """
        try:
            fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), fix="Check the path") from error
        except ValueError as error:
            raise ConfigError(f"is no TOML file: {error}", where=str(path), fix='Write one "field = value" a line') from error
        return cls.from_dict(fields)


def _known(fields: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    for name in fields:
        _one_of("Recipe field", name, names)


def _one_of(where: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ConfigError(f"{value!r} is not known", where=where, fix=one_of(str(value), allowed))


Recipe.FAST = Recipe(name="fast")
Recipe.STANDARD = Recipe(name="standard")
