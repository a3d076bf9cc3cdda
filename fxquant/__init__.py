"""fxquant: vision networks in two to eight bits, as one torch.fx.GraphModule.

qmodel = fxquant.quantize(model, calib_loader, w=2, a=2, cat=True)
"""

from fxquant.correction import append_cat
from fxquant.errors import (
    CalibrationError,
    CATError,
    CheckpointError,
    ConfigError,
    FxquantError,
    FxquantWarning,
    ModelError,
    PassError,
    StorageError,
    TraceError,
)
from fxquant.quantize import quantize
from fxquant.recipe import Recipe
from fxquant.reporting import Report, report
from fxquant.storage import load, save
from fxquant.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "CATError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "FxquantError",
    "FxquantWarning",
    "ModelError",
    "PassError",
    "Recipe",
    "Report",
    "StorageError",
    "TraceError",
    "append_cat",
    "load",
    "quantize",
    "report",
    "save",
    "trace",
]
