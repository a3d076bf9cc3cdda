"""fxquant: vision networks in two to eight bits, as one torch.fx.GraphModule.

qmodel = fxquant.quantize(model, calib_loader, w=2, a=2, cat=True)
"""

from fxquant.correction import append_cat
from fxquant.deploy.compiled import compile
from fxquant.deploy.onnx_export import export_onnx
from fxquant.deploy.pt2 import export_pt2
from fxquant.errors import (
    CalibrationError,
    CATError,
    CheckpointError,
    ConfigError,
    ExportError,
    FxquantError,
    FxquantWarning,
    ModelError,
    PassError,
    StorageError,
    TraceError,
)
from fxquant.lower import lower
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
    "ExportError",
    "FxquantError",
    "FxquantWarning",
    "ModelError",
    "PassError",
    "Recipe",
    "Report",
    "StorageError",
    "TraceError",
    "append_cat",
    "compile",
    "export_onnx",
    "export_pt2",
    "load",
    "lower",
    "quantize",
    "report",
    "save",
    "trace",
]
