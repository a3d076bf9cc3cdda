"""A quantized network as an ONNX file that any runtime reads: every uniform quantizer is QuantizeLinear and DequantizeLinear.

mark      a marker for every quantizer          torch.export, torch.onnx      a float graph with markers
rewrite   markers become Q/DQ                   weights become 2-, 4- or 8-bit integers
check     onnx.checker                          onnxruntime without optimizations, each quantizer fed what the file itself
                                                computed in front of it; then as a user runs it, at two batch sizes
write     the whole file, or none
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.deploy.exported import (
    REPORT,
    Exported,
    batches_of,
    captured,
    compare,
    exportable,
    image_errors,
    write,
)
from fxquant.deploy.onnx_graph import OPSETS, Rewriter, marked, opset_of
from fxquant.errors import ExportError, first_line
from fxquant.execution import sweep
from fxquant.graph import module_of, precision_of
from fxquant.quantizers import LogQuantizer, UniformQuantizer
from fxquant.tree import is_logits, tensors_of

SAME = 1e-4
"""The relative error of outputs computed from equal codes, in another order."""
TIE = 0.02
"""How near to the middle between two levels, in steps, a value may fall on either."""
_QUANTIZERS = UniformQuantizer | LogQuantizer


def export_onnx(qmodel: nn.Module, path: str | os.PathLike[str], *, clip: bool = False, images: Tensor | None = None) -> Exported:
    """Write a quantized network to an ONNX file, atomically, and run it in onnxruntime before that.

    Weights are integers of the smallest ONNX type that holds their bits (2, 4 or 8), packed, with a scale and a zero-point an output
    channel; activations are QuantizeLinear and DequantizeLinear, behind a Clip where the bits do not fill the type. Logarithmic
    grids are plain ops and a table; weights with two grids a channel are packed, with plain ops behind them. The input ``images`` has any
    batch size; the output is ``logits`` (``output`` when it is not ``[N, C]``, ``output_0``, ... of several).

    Outputs are equal up to ties: a runtime sums in another order, and a value between two levels may land on the other one. Where
    weights and activations have 8 bits, onnxruntime computes convolutions in integers, with biases rounded to theirs; elsewhere in float.

    Args:
        qmodel: what `fxquant.quantize` or `fxquant.load` returned, with float32 weights.
        path: the file; an existing one is replaced in one step, and stays as it was when anything fails.
        clip: only 8-bit integers, with a Clip to lower bits, and operator set 18: a larger file, for runtimes from 2023 on.
        images: normalized images ``[N, C, H, W]`` to compare on; None: four random ones, always the same.

    Raises:
        ModelError: `qmodel` carries no record of a quantization.
        ConfigError: `images` are not what the network takes.
        ExportError: onnx, onnxscript or onnxruntime is missing or too old, an op has no ONNX form, the folder is missing, or the file does
            not compute what the network does.
    """
    network, path = exportable(qmodel, path)
    opset = opset_of(network, clip)
    _import_extra(opset)
    dtype = precision_of(network)
    if dtype != torch.float32:
        raise ExportError(f"is {dtype}, and QuantizeLinear takes float32", where=str(path), fix="Give qmodel.float()")
    batches = batches_of(network, images)
    with torch.no_grad():
        outputs = tensors_of(network(batches[0].clone()))
    names = ["logits" if is_logits(outputs[0]) else "output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    model = _converted(network, batches[0], names, opset, str(path))
    rewriter = Rewriter(network, clip)
    rewriter.run(model)
    _rename_batch(model)
    content = _checked(model, str(path))
    _compare_codes(model, network, batches[0], rewriter.values, str(path))
    session = _session(content, opset, str(path))
    found = compare(path, network, batches, [_run(session, batch, str(path)) for batch in batches])
    write(path, content)
    return Exported(path, len(content), opset, **found)


def _import_extra(opset: int) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f"{name} cannot be imported ({first_line(error)})", where="export_onnx", fix='Install it with pip install "fxquant[onnx]"'
            ) from error
        if name == "onnx" and module.defs.onnx_opset_version() < opset:
            raise ExportError(
                f"onnx {module.__version__} has no operator set {opset}",
                where="export_onnx",
                fix="Upgrade onnx, or use clip=True for 8-bit integers",
            )


def _converted(network: GraphModule, images: Tensor, names: list[str], opset: int, where: str) -> Any:
    """Return the ``onnx.ModelProto`` of the network with markers, converted at the lowest operator set and lifted to `opset`."""
    from onnxscript import version_converter

    exported, lowest = captured(marked(network), images, where), OPSETS[8]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                exported, (), input_names=["images"], output_names=names, opset_version=lowest, dynamo=True, verbose=False
            )
            assert program is not None
            version_converter.convert_version(program.model, opset)
            model = program.model_proto
    except Exception as error:  # torch.onnx and onnxscript raise of many kinds, not all public
        raise ExportError(
            f"has no ONNX form: {_culprit(error)}",
            where=where,
            fix="Write the op with others that torch.onnx.export knows",
        ) from error
    reached = next(entry.version for entry in model.opset_import if entry.domain == "")
    if reached != opset:
        raise ExportError(f"onnxscript gives operator set {reached} instead of {opset}", where=where, fix="Upgrade onnxscript")
    model.producer_name, model.producer_version = "fxquant", ""
    return model


def _culprit(error: BaseException) -> str:
    """Return what went wrong and at which node, from the chain of exceptions."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = "\n".join(map(str, chain))
    node = re.search(r"%(\w+) : .*?call_function\[target=([\w.]+)\]", text)
    return f"node {node[1]} ({node[2]}): {first_line(chain[-1])}" if node else first_line(chain[0])


def _rename_batch(model: Any) -> None:
    """Call the batch axis ``batch``, in the input and wherever an output depends on it."""
    old = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(old)}\b", "batch", dim.dim_param)


def _checked(model: Any, where: str) -> bytes:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString())
    except Exception as error:  # ValidationError, InferenceError, and EncodeError from 2 GiB on
        raise ExportError(f"onnx {onnx.__version__} refuses the file: {first_line(error)}", where=where, fix=REPORT) from error


def _session(content: bytes, opset: int, where: str, optimize: bool = True) -> Any:
    """Return an onnxruntime session on the CPU, as a user gets it by default or without optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no public base
        bits = next(bits for bits, first in OPSETS.items() if first == opset)
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} does not take {bits}-bit integers of operator set {opset}: {first_line(error)}",
            where=where,
            fix="Upgrade onnxruntime" + (" (1.31 takes them), or use clip=True for 8-bit integers" if bits < 8 else ""),
        ) from error


def _run(session: Any, images: Tensor, where: str) -> list[Tensor]:
    try:
        return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
    except Exception as error:  # as above
        raise ExportError(f"does not run in onnxruntime with {len(images)} images: {first_line(error)}", where=where, fix=REPORT) from error


def _compare_codes(model: Any, network: GraphModule, images: Tensor, values: dict[str, str], where: str) -> None:
    """Compare every quantizer of the file with that of the network, when what is behind both is what the file computed.

    So one rounding at a tie does not touch what comes after it, and codes must be equal at every other place.

    Raises:
        ExportError: they are not; names the quantizer.
    """
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs = len(probe.graph.output)
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in values.values())
    opset = next(entry.version for entry in model.opset_import)
    got = _run(_session(probe.SerializeToString(), opset, where, optimize=False), images, where)
    theirs = dict(zip(values, got[outputs:], strict=True))
    ahead: dict[Node, Any] = {}
    result: Sequence[Tensor] = []
    for node, mine in sweep(network, [images]):
        module = module_of(node) if node.op == "call_module" else None
        if isinstance(module, _QUANTIZERS) and str(node.target) in theirs:
            value = theirs[str(node.target)]
            off = _wrong_codes(module, ahead[node.all_input_nodes[0]], value)
            if off:
                raise ExportError(
                    f"quantizer {node.target} of the file gives other codes at {off} of {value.numel()} places", where=where, fix=REPORT
                )
            mine[0] = value
        if any(reader.op == "call_module" and isinstance(module_of(reader), _QUANTIZERS) for reader in node.users):
            ahead[node] = mine[0]
        if node.op == "output":
            result = tensors_of(mine[0])
    error = image_errors(result, got[:outputs]).max().item()
    if error > SAME:
        raise ExportError(f"computes other outputs from equal codes: relative error {error:.2g}", where=where, fix=REPORT)


def _wrong_codes(quantizer: UniformQuantizer | LogQuantizer, x: Tensor, theirs: Tensor) -> int:
    """Return at how many places the values `theirs` are not those of `x`, nor those of the level beside it at a tie."""
    if x.shape != theirs.shape:
        return max(x.numel(), 1)
    steps = quantizer.steps(x) if isinstance(quantizer, LogQuantizer) else x / quantizer.along(quantizer.scale, x)
    apart = (quantizer.quantize(theirs) - quantizer.quantize(x)).abs()
    tie = ((steps - steps.floor()) - 0.5).abs() <= TIE
    on_grid = torch.isclose(quantizer(theirs), theirs, rtol=1e-5, atol=0)
    return int(((apart > 1) | ((apart == 1) & ~tie) | ~on_grid).sum())
