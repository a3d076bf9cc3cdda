"""Recipe: every constant of a quantization run, in one frozen object that can be read, changed, saved and compared."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fxquant.errors import ConfigError, one_of
from fxquant.recipe_values import NUMBERS, WORDS

T = TypeVar("T")

STAGES = ("reparameterize", "ranges", "bias", "erq", "units", "scales", "output_kl", "finish", "cat")
"""What a recipe can do, in the order it is done:

reparameterize  move the channels behind layer norms so that one grid suits them all (RepQ-ViT); outputs stay equal
ranges          choose scales and zero-points from the calibration images
bias            match the mean and spread of every output channel
erq             fit each layer to its quantized inputs by ridge regression, round it with the columns left making up for it (ERQ)
units           learn the rounding of each unit (layer, block, pack) against its float output, front to back
scales          learn the activation scales of each unit, weights as they are (the second phase of BRECQ)
output_kl       learn scales and zero-points by the KL of the logits, held near where they start (the first stage of CAT's paper)
finish          train everything that costs nothing at inference against the float network, on fresh views of the calibration images
cat             append a cluster-based affine transformation of the logits
"""


@dataclass(frozen=True)
class Recipe:
    """The constants of a run.

    Named ones are ``Recipe.FAST``, ``STANDARD``, ``BEST``, ``FINISH``, ``ADAROUND``, ``BRECQ``, ``QDROP``, ``PDQUANT``, ``GENIE``,
    ``PACKPTQ``, ``ERQ`` and ``OUTPUT_KL``; ``Recipe.QDROP.replace(unit_iterations=1000)`` changes a field. Where a field of a unit has no
    source, its default is that of QDrop.

    Raises:
        ConfigError: a field with a value that cannot be meant, by name, with what to write instead.
    """

    name: str = "custom"
    stages: tuple[str, ...] = ("ranges", "bias", "cat")
    """Which stages run, ``"ranges"`` and any of the others of `STAGES`; the order is fixed."""

    weight_range: str = "lp"
    """Range estimator of weights, per output channel: ``"lp"``, ``"minmax"``, ``"percentile"``, ``"kl"``."""
    weight_p: float = 2.4
    """Exponent of the L_p search for weights (LAPQ; 2.4 as in BRECQ, QDrop and PD-Quant)."""
    weight_symmetric: bool = False
    """Signed weights with zero-point 0 instead of a zero-point per channel; those of 8 bits always are, to fit signed bytes."""
    activation_range: str = "lp"
    """Range estimator of activations, per tensor."""
    activation_p: float = 2.0
    """Exponent of the L_p search for activations (examples/06_ablation.md)."""
    activation_error: str = "relative"
    """Errors that this search adds up: ``"absolute"``, or ``"relative"`` to the root mean square of the image's activation, so that a few
    images with enormous values do not decide on the step for all. Logarithmic grids and channels behind layer norms take absolute ones."""
    activation_symmetric: bool = False
    softmax_quantizer: str = "uniform"
    """Grid of the outputs of a softmax: ``"uniform"``, ``"log2"`` (powers of two) or ``"logsqrt2"`` (of its root, RepQ-ViT)."""
    matmul_scales: str = "tensor"
    """What the operands of a matmul have a scale and a zero-point for: ``"tensor"``, or ``"head"``, each head of ``[N, heads, L, d]``."""
    percentile: float = 0.9999
    """Share of values inside the range for the estimator ``"percentile"``."""

    bias_images: int = 256
    """Images for bias correction and for the channels of layer norms; fewer when their activations do not fit into `memory_gib`."""
    bias_gain: str = "balanced"
    """What is done about the spread of each output channel along with its mean: ``"none"``, ``"spread"``, ``"regression"`` or
    ``"balanced"`` (see `fxquant.passes.CorrectBias`)."""
    bias_means: str = "images"
    """Where the means that biases are corrected by come from: ``"images"`` (measured, errors of activations included), or ``"norms"``, the
    batch norms that were folded, which know of the errors of weights alone (then without a gain)."""
    erq_images: int = 1024
    """Images that layers are fitted to in closed form; fewer when their activations do not fit into `memory_gib`."""
    erq_ridge: float = 0.0
    """Ridge for each token, as a share of the mean square of the layer's inputs; 0 searches it by cross-validation, layer by layer."""
    weight_groups: str = "one"
    """Grids of an output of the linear layers behind a reparameterized layer norm, where ERQ rounds them: ``"one"``, or ``"dual"``, one for
    the few columns with outliers and one for the others. Two grids cannot be learned, nor lowered to integers."""
    erq_flips: int = 100
    """Most codes of an output that each refinement of the rounding flips (ERQ)."""
    memory_gib: float = 2.0
    """Budget for activations held at once, in GiB: bias correction takes fewer images, the cache of the units moves on into a memory-mapped
    file. What that cache has on a GPU is not counted: it leaves a quarter of it free there, and at least twice this budget."""
    cache_dtype: str = "same"
    """How the cache of the units stores activations: ``"same"`` (as they are) or ``"bfloat16"`` (half the bytes)."""
    precision: str = "float32"
    """In which precision the learning stages multiply: ``"float32"``, or ``"bfloat16"`` by autocast. Results are float32 either way."""
    compile: bool = False
    """Compile the steps of the network-wise stages with ``torch.compile`` (on CUDA with CUDA graphs); those of units never are, as each of
    them would have to be compiled for itself."""

    unit_granularity: str = "block"
    """What is learned together: ``"layer"``, ``"block"``, ``"pack"`` (runs of blocks, Pack-PTQ) or ``"network"``."""
    unit_longest: int = 12
    """Most layers of a block, whose outputs are also what the stage `finish` compares: longer ones are split where they can be."""
    pack_length: int = 4
    """Most blocks in a pack."""
    pack_score: str = "simple"
    """How sensitive a block is: ``"simple"``, ``2 KL / mean(error^2)``, or ``"literal"``, with the first-order term as published."""
    unit_iterations: int = 20_000
    unit_batch: int = 32
    """Images a step, in the stage ``"scales"`` and in the correction of inputs as well."""
    unit_sampling: str = "random"
    """How batches are drawn: ``"random"`` (with replacement) or ``"epochs"`` (each image once a pass)."""
    unit_rounding_rate: float = 1e-3
    """Adam's rate for the rounding."""
    unit_rounding_weight: float = 0.01
    """Weight of the loss that drives the rounding to 0 or 1."""
    unit_beta_start: float = 20.0
    unit_beta_end: float = 2.0
    """The exponent of that loss behind the warm-up, and at the end."""
    unit_beta_shape: str = "linear"
    unit_warmup: float = 0.2
    """Share of the iterations without that loss."""
    unit_activations: bool = True
    """Quantize activations while units are learned; False: weights alone, as AdaRound and the first phase of BRECQ."""
    unit_activation_rate: float = 4e-5
    """Rate for the scales of activations, falling along a cosine; 0 keeps them."""
    unit_scale_rate: float = 0.0
    """Rate for the scales of weights, falling along a cosine (Genie-M: 1e-4); 0 keeps them."""
    unit_bias_rate: float = 0.0
    """Rate for biases, falling along a cosine; 0 keeps them."""
    unit_drop: float = 0.5
    """Probability with which an activation stays float inside a unit (QDrop)."""
    unit_input_drop: float = 0.5
    """Share of a unit's input taken from the float network, elementwise (QDrop)."""
    unit_fisher: str = "none"
    """Weight errors by the gradient of the KL of the logits: ``"none"``, ``"diagonal"`` or ``"full"`` (BRECQ)."""
    unit_kl_weight: float = 0.0
    """Weight of the KL of the logits behind the float rest of the network (PD-Quant: 10)."""
    unit_kl_temperature: float = 4.0
    unit_correction_iterations: int = 0
    """Steps of distribution correction for each batch of a unit's float input (PD-Quant: 500)."""
    unit_correction_rate: float = 1e-3
    unit_correction_patience: int = 100
    unit_correction_decay: float = 0.1
    unit_correction_least_rate: float = 1e-5
    """Steps without a smaller loss, behind which that rate falls by this factor, down to this one."""
    unit_correction_pull: float = 50.0
    """Weight that holds the corrected input to the true one (PD-Quant: 1 / 0.02)."""
    unit_ranges: str = "float"
    """Where the scales of activations start: ``"float"``, from the float network, or ``"prefix"``, from what reaches the unit
    (PD-Quant)."""
    unit_range_images: int = 256
    """Images on which they are then chosen."""

    scales_iterations: int = 5000
    scales_rate: float = 4e-4
    scales_p: float = 2.4

    output_kl_iterations: int = 1000
    output_kl_batch: int = 64
    output_kl_rate: float = 4e-5
    """Rate for the scales of weights and activations, as a ratio to where they start."""
    output_kl_zero_point_rate: float = 2e-3
    """Rate for zero-points, in codes."""
    output_kl_temperature: float = 4.0
    """T of the CAT paper's first stage (its runs use 4 for ResNets, 1 for mobile networks)."""
    output_kl_penalty: float = 0.1
    """lambda_p, which holds scales and zero-points to where they start."""

    finish_iterations: int = 3200
    finish_batch: int = 64
    finish_weight_rate: float = 0.01
    """Adam's peak rate for weights of two bits, in steps of their grid."""
    finish_level_power: float = 1.25
    """How that rate grows with the levels L of a grid, ``(L / 4) ** power``. At 1, weights of all bits move by the same share of their
    range; above, those of more bits, which are free to follow, move farther."""
    finish_scale_rate: float = 3e-3
    """Rate for the scales of weights, as a ratio to where they start."""
    finish_activation_rate: float = 3e-3
    """Rate for the scales of activations, as a ratio to where they start."""
    finish_bias_rate: float = 1.5e-3
    finish_fine_power: float = 1.0
    """How all these rates fall with the levels L of the network's coarsest grid, ``(4 / L) ** power``: finer grids leave less to make up
    for, and steps as large as those for two bits would add more noise than they take away."""
    finish_warmup: float = 0.02
    """Share of the iterations in which the rates rise; then they fall along a cosine."""
    finish_temperature: float = 1.0
    """Temperature T of the KL of the logits, which is weighted by its square."""
    finish_feature_weight: float = 100.0
    """Weight of the normalized error at unit outputs."""
    finish_mix: float = 0.0
    """Share of the float value in activations at the start."""
    finish_mix_until: float = 0.6
    """Share of the iterations at which that share has fallen to 0."""
    finish_augment: str = "crop+flip"
    """How views of the calibration images are made when the loader has no randomness of its own, as `augment`."""
    finish_blend: float = 1.0
    """Share of the batches in which images are blended (mixup) or cut together (CutMix), one half each; the teacher says what they show."""
    finish_color: float = 0.0
    """How far contrast, saturation and tint of each view are changed at random, as a share; it falls with finer grids as the square of what
    the rates fall by."""
    finish_holdout: float = 0.0625
    """Share of the calibration images kept out of the training, to choose by their KL which state is kept; of `output_kl`, too."""
    finish_checks: int = 20
    """How often that is looked at, in `output_kl`, too."""
    finish_margin: float = 2.0
    """How many standard errors of the mean difference, image by image, the best state must be ahead of the last one by to be kept
    instead; where the last one is no better than the start, the best is kept anyway. 0: always the best, as `output_kl` does."""
    finish_holdout_temperature: float = 4.0
    """Temperature T of the KL (times ``T^2``) on the held-out images."""
    finish_match: bool = True
    """Hold mean and spread of the channels of convolutions into which a batch norm was folded to those of the float network, batch by
    batch, as long as the training lasts; scales and biases take that over in the end (`fxquant.reconstruction.matching`)."""
    finish_match_images: int = 256
    """Images from whose mean and spread they do so."""
    finish_averaging: float = 0.0
    """Decay of the moving average of everything learned, which is what stays (0: the last state)."""

    augment: str = "crop"
    """How fresh views of the calibration images are made when the loader has no randomness of its own: ``"none"``, ``"crop"`` (shift),
    ``"crop+flip"``."""
    augment_reach: float = 0.125
    """By which share of the image such a view is shifted at most, in both stages that make views; by one pixel at least."""
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

    ADAROUND: ClassVar[Recipe]
    BEST: ClassVar[Recipe]
    BRECQ: ClassVar[Recipe]
    ERQ: ClassVar[Recipe]
    FAST: ClassVar[Recipe]
    FINISH: ClassVar[Recipe]
    GENIE: ClassVar[Recipe]
    OUTPUT_KL: ClassVar[Recipe]
    PACKPTQ: ClassVar[Recipe]
    PDQUANT: ClassVar[Recipe]
    QDROP: ClassVar[Recipe]
    STANDARD: ClassVar[Recipe]

    def __post_init__(self) -> None:
        if isinstance(self.stages, str) or not set(self.stages) <= set(STAGES) or "ranges" not in self.stages:
            raise ConfigError(f"{self.stages!r} are not stages", where="Recipe.stages", fix=f"Choose 'ranges' and any others of {STAGES}")
        object.__setattr__(self, "stages", tuple(stage for stage in STAGES if stage in self.stages))
        for name, words in WORDS.items():
            _one_of(f"Recipe.{name}", getattr(self, name), words)
        for name, (low, high) in NUMBERS.items():
            value, kinds = getattr(self, name), int if isinstance(low, int) else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "whole number" if kinds is int else "number"
                raise ConfigError(f"{value!r} is no {what} from {low} to {high}", where=f"Recipe.{name}", fix="Choose one")
        missing = [stage for stage in ("reparameterize", "erq") if stage not in self.stages]
        if self.weight_groups == "dual" and missing:
            raise ConfigError(
                f"'dual' changes nothing without the stage {missing[0]!r}",
                where="Recipe.weight_groups",
                fix="Use 'one', or start from Recipe.ERQ",
            )
        learned = [stage for stage in self.stages if stage in ("units", "scales", "output_kl", "finish")]
        if self.weight_groups == "dual" and learned:
            raise ConfigError(
                f"'dual' grids cannot be learned, as the stage {learned[0]!r} would",
                where="Recipe.weight_groups",
                fix="Use 'one', or leave the stage out",
            )
        for name in ("weight_symmetric", "activation_symmetric", "unit_activations", "finish_match", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{getattr(self, name)!r} is no truth value", where=f"Recipe.{name}", fix="Use True or False")
        if not isinstance(self.name, str):
            raise ConfigError(f"{self.name!r} is no name", where="Recipe.name", fix="Use a string")

    @classmethod
    def named(cls, recipe: str | Recipe) -> Recipe:
        """Return the recipe called `recipe` (``"fast"``, ``"standard"``, ``"qdrop"``, ...), or `recipe` itself."""
        if isinstance(recipe, Recipe):
            return recipe
        _one_of("recipe", recipe, tuple(PRESETS))
        return PRESETS[recipe]

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed; its name gets a ``+`` behind it unless a new one is given."""
        _known(changes)
        return dataclasses.replace(self, **{"name": self.name.rstrip("+") + "+", **changes})

    def settings(self, kind: type[T], prefix: str, **given: Any) -> T:
        """Return the dataclass `kind` with each field not `given` from ``<prefix>_<field>`` or ``<field>`` here, where there is one."""
        for name in (field.name for field in dataclasses.fields(kind)):  # type: ignore[arg-type]
            source = next((own for own in (f"{prefix}_{name}", name) if hasattr(self, own)), None)
            if source and name not in given:
                given[name] = getattr(self, source)
        return kind(**given)

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


_UNITS = ("ranges", "units")
_PUBLISHED_RANGES: dict[str, Any] = {"activation_p": 2.4, "activation_error": "absolute"}
"""Each value counted alike, as in all of these papers, with the exponent of QDrop and PD-Quant."""

# The published recipes differ from their sources where this engine does something for all of them alike: weights start from the same two-
# dimensional L_2.4 search, activation ranges from all calibration images, the first unit is learned like the others, bits at the edges are
# those of `edges`, tensors are quantized where QDrop does (Genie, Pack-PTQ: in front of layers), batch norms are folded (Pack-PTQ: not).
# PD-Quant's temperature, pull and weights are those for ResNets (for mobile networks: 1, 200 and 0.1); AdaRound's 20,000 iterations are
# those of the others (AIMET: 15,000); Pack-PTQ's literal score takes its gradient at the quantized output; `output_kl` learns steps as
# ratios to where they start. ERQ fits each layer behind those already rounded (the paper: to the inputs of the float network), has one
# grid a channel, where the paper has two for qkv and fc1 (``weight_groups="dual"``), and ends with scales and codes that are optimal in
# turn. Gradients of steps are not scaled by 1 / sqrt(elements times levels) (LSQ), steps stay above a thousandth of where they start, and
# what is dropped is cut from one long random sequence.

Recipe.FAST = Recipe(name="fast")
Recipe.ADAROUND = Recipe(
    name="adaround",
    stages=_UNITS,
    unit_granularity="layer",
    unit_activations=False,
    unit_input_drop=0.0,
    unit_beta_shape="cosine",
    **_PUBLISHED_RANGES,
)
Recipe.BRECQ = Recipe(name="brecq", stages=("ranges", "units", "scales"), unit_activations=False, unit_input_drop=0.0, **_PUBLISHED_RANGES)
Recipe.QDROP = Recipe(name="qdrop", stages=_UNITS, **_PUBLISHED_RANGES)
Recipe.PDQUANT = Recipe(
    name="pdquant",
    stages=_UNITS,
    unit_rounding_rate=3e-3,
    unit_kl_weight=10.0,
    unit_correction_iterations=500,
    unit_ranges="prefix",
    **_PUBLISHED_RANGES,
)
Recipe.GENIE = Recipe(
    name="genie",
    stages=_UNITS,
    unit_scale_rate=1e-4,
    unit_rounding_weight=1.0,
    unit_sampling="epochs",
    activation_symmetric=True,
    **_PUBLISHED_RANGES,
)
Recipe.PACKPTQ = Recipe(name="packptq", stages=_UNITS, unit_granularity="pack", unit_batch=16, unit_rounding_rate=3e-3, **_PUBLISHED_RANGES)
Recipe.ERQ = Recipe(name="erq", stages=("reparameterize", "ranges", "erq"), softmax_quantizer="logsqrt2", **_PUBLISHED_RANGES)
Recipe.OUTPUT_KL = Recipe(name="output_kl", stages=("ranges", "output_kl"), **_PUBLISHED_RANGES)
Recipe.FINISH = Recipe(name="finish", stages=("ranges", "finish"))
Recipe.STANDARD = Recipe(name="standard", stages=("ranges", "bias", "finish", "cat"), precision="bfloat16")
Recipe.BEST = Recipe(
    name="best",
    stages=("reparameterize", "ranges", "bias", "finish", "cat"),
    softmax_quantizer="logsqrt2",
    precision="bfloat16",
    finish_iterations=8000,
    finish_color=0.4,
)

PRESETS = {value.name: value for value in vars(Recipe).values() if isinstance(value, Recipe)}
"""The named recipes."""
