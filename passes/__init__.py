"""Graph passes: how a float graph becomes a quantized one, one pass a file, in the order below. README.md shows each as a picture."""

from fxquant.passes.absorb_high_bias import AbsorbHighBias
from fxquant.passes.append_cat import AppendCAT
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.correct_bias import CorrectBias
from fxquant.passes.correct_bias_from_norms import CorrectBiasFromNorms
from fxquant.passes.equalize_channels import EqualizeChannels
from fxquant.passes.finish_network import FinishNetwork
from fxquant.passes.fold_batch_norm import FoldBatchNorm
from fxquant.passes.fold_constants import FoldConstants
from fxquant.passes.freeze import Freeze
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.passes.insert_observers import InsertObservers
from fxquant.passes.lower_integer import LowerInteger
from fxquant.passes.modularize_weights import ModularizeWeights
from fxquant.passes.open_attention import OpenAttention
from fxquant.passes.reconstruct_units import ReconstructUnits
from fxquant.passes.reduce_error import ReduceError
from fxquant.passes.reparameterize_norms import ReparameterizeNorms
from fxquant.passes.split_norm_act import SplitNormAct
from fxquant.passes.unshare_modules import UnshareModules

PREPARE = (Canonicalize, FoldConstants, OpenAttention, ModularizeWeights, UnshareModules, SplitNormAct, FoldBatchNorm)
"""From the traced graph to the float graph that is quantized; outputs stay equal."""

QUANTIZE = (
    ReparameterizeNorms,
    InsertObservers,
    InsertFakeQuant,
    CorrectBias,
    ReduceError,
    ReconstructUnits,
    FinishNetwork,
    Freeze,
    AppendCAT,
)
"""From that float graph to the quantized one."""

__all__ = [
    "PREPARE",
    "QUANTIZE",
    "AbsorbHighBias",
    "AppendCAT",
    "Canonicalize",
    "CorrectBias",
    "CorrectBiasFromNorms",
    "EqualizeChannels",
    "FinishNetwork",
    "FoldBatchNorm",
    "FoldConstants",
    "Freeze",
    "InsertFakeQuant",
    "InsertObservers",
    "LowerInteger",
    "ModularizeWeights",
    "OpenAttention",
    "ReconstructUnits",
    "ReduceError",
    "ReparameterizeNorms",
    "SplitNormAct",
    "UnshareModules",
]
