"""The words and numbers that the fields of a `Recipe` can have."""

from fxquant.placement import MATMUL_SCALES

_RANGES = ("lp", "minmax", "percentile", "kl")
WORDS: dict[str, tuple[str, ...]] = {
    "weight_range": _RANGES,
    "activation_range": _RANGES,
    "activation_error": ("absolute", "relative"),
    "softmax_quantizer": ("uniform", "log2", "logsqrt2"),
    "matmul_scales": MATMUL_SCALES,
    "weight_groups": ("one", "dual"),
    "bias_gain": ("none", "spread", "regression", "balanced"),
    "bias_means": ("images", "norms"),
    "augment": ("none", "crop", "crop+flip"),
    "finish_augment": ("none", "crop", "crop+flip"),
    "cache_dtype": ("same", "bfloat16"),
    "precision": ("float32", "bfloat16"),
    "unit_granularity": ("layer", "block", "pack", "network"),
    "pack_score": ("simple", "literal"),
    "unit_sampling": ("random", "epochs"),
    "unit_beta_shape": ("linear", "cosine"),
    "unit_fisher": ("none", "diagonal", "full"),
    "unit_ranges": ("float", "prefix"),
}
"""The words that a field can have."""

NUMBERS: dict[str, tuple[float, float]] = {
    "weight_p": (1.0, 10.0),
    "activation_p": (1.0, 10.0),
    "percentile": (0.501, 1.0),
    "cat_alpha": (0.0, 1.0),
    "memory_gib": (0.001, 10_000.0),
    "erq_ridge": (0.0, 1e6),
    "erq_flips": (0, 10**6),
    **dict.fromkeys(("bias_images", "erq_images", "unit_batch", "output_kl_batch", "finish_batch"), (1, 10**9)),
    **dict.fromkeys(("unit_range_images", "finish_match_images"), (1, 10**9)),
    **dict.fromkeys(("unit_iterations", "unit_correction_iterations", "scales_iterations", "output_kl_iterations"), (0, 10**9)),
    "finish_iterations": (0, 10**9),
    "finish_checks": (1, 10**6),
    **dict.fromkeys(("pack_length", "unit_longest"), (1, 1000)),
    "unit_correction_patience": (0, 10**9),
    "unit_correction_decay": (0.0, 0.999),
    "cat_views": (1, 1000),
    "cat_folds": (2, 100),
    "cat_clusters": (1, 10**6),
    "cat_pca": (0, 10**6),
    **dict.fromkeys(
        ("unit_rounding_rate", "unit_activation_rate", "unit_scale_rate", "unit_bias_rate", "unit_correction_rate"), (0.0, 10.0)
    ),
    "unit_correction_least_rate": (0.0, 10.0),
    **dict.fromkeys(("scales_rate", "output_kl_rate", "output_kl_zero_point_rate", "finish_weight_rate", "finish_scale_rate"), (0.0, 10.0)),
    **dict.fromkeys(("finish_activation_rate", "finish_bias_rate"), (0.0, 10.0)),
    **dict.fromkeys(("unit_rounding_weight", "unit_kl_weight", "unit_correction_pull", "output_kl_penalty"), (0.0, 1e9)),
    "finish_feature_weight": (0.0, 1e9),
    **dict.fromkeys(("finish_level_power", "finish_fine_power"), (0.0, 2.0)),
    **dict.fromkeys(("unit_kl_temperature", "output_kl_temperature", "finish_temperature", "finish_holdout_temperature"), (1e-3, 1e3)),
    **dict.fromkeys(("unit_beta_start", "unit_beta_end"), (1.0, 1e3)),
    "scales_p": (1.0, 10.0),
    **dict.fromkeys(("unit_warmup", "unit_drop", "unit_input_drop", "finish_mix", "finish_mix_until", "finish_blend"), (0.0, 1.0)),
    **dict.fromkeys(("finish_warmup", "finish_holdout"), (0.0, 0.9)),
    "finish_averaging": (0.0, 0.99999),
    "finish_margin": (0.0, 1e3),
    **dict.fromkeys(("finish_color", "augment_reach"), (0.0, 1.0)),
}
"""The smallest and the largest number that a field can have; whole where the smallest is written so."""
