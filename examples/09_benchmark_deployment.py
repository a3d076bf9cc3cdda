"""How fast and how small: lowered networks against float32, bfloat16, the simulation, onnxruntime's int8 and torchao's, in one run.

    pip install -e ".[onnx,plots]" torchao
    python examples/09_benchmark_deployment.py
    python examples/09_benchmark_deployment.py --networks mobilenet_v2 --bits W2A2 --batches 1 --threads 1 --rounds 3 --skip-sizes
    python examples/09_benchmark_deployment.py --networks resnet18 resnet50 --out deployment
    python examples/09_benchmark_deployment.py --batches
    python examples/09_benchmark_deployment.py --device cuda --batches 1 64 256 --skip-sizes

Weights are random, and batch norms random with the statistics of random images: neither speed nor size depends on accuracy. All columns
of a row take turns, so that a busy machine slows all of them, of a few calls, so that caches are as warm as where one network serves;
times are medians. Each row is appended to OUT/runs.jsonl as soon as it is measured, and not repeated when it is there already; OUT/runs.md
and OUT/runs.png are made from all rows of this machine's versions. A peer that is not installed, or fails, is shown as "-", with the reason
below. The peers compute in 8 bits whatever the bits of the row. With --device cuda single images run as CUDA graphs in every column, and
the peers, which are for CPUs, are left out. Simulated and lowered networks run large batches in parts on a CPU; "float32, in parts" is the
float network run so, too.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import io
import json
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.deploy.latency import frozen, latencies, threads, variants
from fxquant.lower import BACKENDS
from fxquant.networks import build
from fxquant.placement import EDGES

revision = importlib.import_module("06_reconstruction").revision  # beside this file, so it is found where this one is run as a script

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "timm:regnetx_006")
COLUMNS = ("float32, compiled", "float32, in parts", "bfloat16, compiled", "simulated, compiled", "onnxruntime int8", "torchao int8")
LOWERED = "lowered, compiled"
SIZES = ("float state_dict", "file W8", "file W4", "file W2", "ONNX W8", "ONNX W4", "ONNX W2", "ONNX clip", "torchao int8")
COMPARED = 64
"""Random images on which the lowered network is compared with the simulation."""

Row = dict[str, Any]
Network = Callable[[Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help=f"(default: {' '.join(NETWORKS)})")
    parser.add_argument("--bits", nargs="+", default=["W2A2", "W8A8"], metavar="WxAy", help="(default: W2A2 W8A8)")
    parser.add_argument("--edges", default="integer", choices=EDGES, help="integer: images, shortcuts at 8 bits, as peers have (default)")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32], metavar="N", help="(default: 1 8 32; none: sizes alone)")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="(default: 1 2; 1 with --device cuda)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each column (default: 5)")
    parser.add_argument("--device", default="cpu", choices=BACKENDS, help="(default: cpu)")
    parser.add_argument("--skip-peers", action="store_true", help="leave out onnxruntime and torchao")
    parser.add_argument("--skip-sizes", action="store_true", help="leave out the table of sizes")
    parser.add_argument("--out", type=Path, default=Path("deployment"), help="folder for rows, tables and the plot (default: deployment)")
    options = parser.parse_args()
    wrong = [bits for bits in options.bits if not re.fullmatch(r"W[2-8]A[2-8]", bits)]
    if wrong:
        parser.error(f"{wrong[0]!r} is no setting such as W2A2")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none that torch can use")
    counts = options.threads or ([1, 2] if options.device == "cpu" else [1])
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "runs.jsonl"
    for name in options.networks:
        wanted = [(bits, count, batch) for bits in options.bits for count in counts for batch in options.batches]
        keys = [speed_key(name, *what, options) for what in wanted]
        if not options.skip_sizes:
            keys.append({**base_key(name, options.device), "table": "size"})
        missing = [key for key in keys if not any(key.items() <= row.items() for row in rows_of(log))]
        if missing:
            measure(Case(name, options.device), missing, options.rounds, log)
    rows = [row for row in rows_of(log) if base_key(row["network"], options.device).items() <= row.items()]
    text = speed_table([row for row in rows if row["table"] == "speed"]) + size_table([row for row in rows if row["table"] == "size"])
    (options.out / "runs.md").write_text(text, encoding="utf-8")
    plot([row for row in rows if row["table"] == "speed"], options.out / "runs.png")
    print(text)


def measure(case: Case, keys: list[Row], rounds: int, log: Path) -> None:
    """Measure what `keys` name, and append it to the log row by row."""
    for key in keys:
        start = time.perf_counter()
        found = sizes(case) if key["table"] == "size" else speed(case, key, rounds)
        row = {**key, **found, "seconds": round(time.perf_counter() - start)}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


class Case:
    """A network with random weights, random images, and what was quantized of it, which is on `device`."""

    def __init__(self, name: str, device: str):
        torch.manual_seed(0)
        self.device = device
        self.model = build(name).model
        self.calibration = [pictures(8, 1), pictures(8, 2)]
        self.images = pictures(COMPARED, 3)
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
            norm.momentum = None  # the mean of what it sees
            norm.train()
        with torch.no_grad():
            self.model(self.calibration[0])
        self.model.eval()
        self.quantized: dict[str, tuple[GraphModule, GraphModule, Tensor]] = {}
        self.onnx = b""

    def bits(self, bits: str, edges: str) -> tuple[GraphModule, GraphModule, Tensor]:
        """Return the simulation, the lowered network, and the logits of the simulation for `images`."""
        if bits not in self.quantized:
            w, a = int(bits[1]), int(bits[3])
            given = {"cat": False, "recipe": "fast", "edges": edges, "progress": False}
            simulated = fxquant.quantize(self.model, self.calibration, w, a, **given)
            with torch.no_grad():
                logits = torch.cat([simulated(batch) for batch in self.images.split(16)])
            simulated = simulated.to(self.device)
            self.quantized[bits] = simulated, fxquant.lower(simulated, self.device), logits
        return self.quantized[bits]


def pictures(count: int, seed: int) -> Tensor:
    """Return random images that differ: colored clouds under noise."""
    generator = torch.Generator().manual_seed(seed)
    clouds = F.interpolate(2 * torch.randn(count, 3, 7, 7, generator=generator), 224, mode="bilinear")
    return clouds + 0.5 * torch.randn(count, 3, 224, 224, generator=generator)


def speed(case: Case, key: Row, rounds: int) -> Row:
    """Return milliseconds by column, why columns are missing, and how far the lowered network is from the simulation."""
    simulated, lowered, expected = case.bits(key["bits"], key["edges"])
    compared = case.images.to(case.device)
    images = compared[: key["batch"]].contiguous(memory_format=torch.channels_last)
    if len(images) < key["batch"]:
        images = images.repeat(-(-key["batch"] // len(images)), 1, 1, 1)[: key["batch"]]
    cuda_graphs = case.device == "cuda" and key["batch"] == 1
    with threads(key["threads"]):
        model = copy.deepcopy(case.model).to(case.device)
        networks: dict[str, Network] = dict(variants(model, simulated, lowered, cuda_graphs))
        del networks["float32, eager"]
        if key["batch"] > 1:
            networks["float32, in parts"] = fxquant.compile(fxquant.trace(model, images[:2]))
        missing: dict[str, str] = {}
        for name, make in {} if not key["peers"] else {"onnxruntime int8": onnxruntime_int8, "torchao int8": torchao_int8}.items():
            try:
                networks[name] = make(case, images)
                networks[name](images)
            except Exception as error:  # whatever a peer raises is its reason
                networks.pop(name, None)
                missing[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"
        found = latencies(networks, images, rounds)
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in compared.split(key["batch"])]
        logits = torch.cat([networks[LOWERED](batch) for batch in batches if len(batch) == len(batches[0])]).cpu()
    expected = expected[: len(logits)]
    difference = (logits - expected).abs().max() / (expected.max() - expected.min())
    return {
        "milliseconds": found,
        "missing": missing,
        "difference": difference.item(),
        "agreement": (logits.argmax(1) == expected.argmax(1)).double().mean().item(),
        "compared": len(logits),
        "on": "integers" if fxquant.report(lowered).record.lowered else "the simulation",
    }


def onnxruntime_int8(case: Case, images: Tensor) -> Network:
    """Return the network in onnxruntime's int8, on as many threads as torch has."""
    import onnxruntime

    case.onnx = case.onnx or onnx_int8(case)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would spin on while others take their turn
    session = onnxruntime.InferenceSession(case.onnx, settings, providers=["CPUExecutionProvider"])
    plain = images.contiguous().numpy()  # it takes NCHW; what it is given is made once, so that its time is its own
    return lambda given: session.run(None, {"images": plain if given is images else given.contiguous().numpy()})


def onnx_int8(case: Case) -> bytes:
    """Return the network as onnxruntime quantizes it: statically, QDQ, a scale a channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(case.calibration)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        float_file, ready, file = (str(Path(folder) / f"{name}.onnx") for name in ("float", "ready", "int8"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = {0: torch.export.Dim("batch", min=1, max=1024)}
            names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
            given = (case.calibration[0],)
            torch.onnx.export(
                case.model, given, float_file, dynamo=True, dynamic_shapes=(batch,), external_data=False, verbose=False, **names
            )
        quant_pre_process(float_file, ready, skip_symbolic_shape=True)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, file, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        return Path(file).read_bytes()


def torchao_int8(case: Case, images: Tensor) -> Network:
    """Return the network of torchao's PT2E int8 path for x86, compiled with freezing for the size of `images`."""
    return frozen(torchao_converted(case, images))


def torchao_converted(case: Case, images: Tensor) -> GraphModule:
    """Return the network with quantize and dequantize ops and int8 weights, as torchao makes it for its x86 path."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # strict: elsewhere its quantizer refuses a ReLU module that is called twice
        graph = torch.export.export(copy.deepcopy(case.model), (images,), strict=True).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)  # type: ignore[arg-type]
        pool = torch.cat(case.calibration)
        prepared(pool.repeat(-(-len(images) // len(pool)), 1, 1, 1)[: len(images)])
        return convert_pt2e(prepared)


def sizes(case: Case) -> Row:
    """Return bytes by column, and why columns are missing."""
    found: dict[str, int] = {"float state_dict": len(safetensors.torch.save(case.model.state_dict()))}
    missing: dict[str, str] = {}

    def add(name: str, measured: Callable[[], int]) -> None:
        try:
            found[name] = measured()
        except Exception as error:  # a peer that is not there, or does not take the network
            missing[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"

    recipe = fxquant.Recipe.FAST.replace(stages=("ranges",), weight_range="minmax", activation_range="minmax")
    with tempfile.TemporaryDirectory() as folder:
        for bits in (8, 4, 2):
            qmodel = fxquant.quantize(case.model, case.calibration[:1], bits, bits, cat=False, recipe=recipe, progress=False)
            path = Path(folder) / "network.safetensors"
            fxquant.save(qmodel, path)
            found[f"file W{bits}"] = path.stat().st_size
            add(f"ONNX W{bits}", lambda qmodel=qmodel: onnx_bytes(qmodel, folder, False))
        add("ONNX clip", lambda: onnx_bytes(qmodel, folder, True))
    add("torchao int8", lambda: state_bytes(torchao_converted(case, case.calibration[0])))
    return {"bytes": found, "missing": missing}


def onnx_bytes(qmodel: nn.Module, folder: str, clip: bool) -> int:
    return fxquant.export_onnx(qmodel, Path(folder) / "network.onnx", clip=clip).size


def state_bytes(graph: GraphModule) -> int:
    """Return the bytes of the tensors that the graph reads: torchao leaves the float weights beside the int8 ones."""
    used = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in graph.state_dict().items() if name in used}, buffer)
    return buffer.getbuffer().nbytes


def base_key(name: str, device: str) -> Row:
    """Return what all rows of a network are known by: numbers of other code or of another processor are not reused."""
    versions = {"torch": torch.__version__, "fxquant": revision()}
    for package in ("onnxruntime", "torchao"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return {"network": name, "versions": versions, "processor": processor(device)}


def speed_key(name: str, bits: str, count: int, batch: int, options: argparse.Namespace) -> Row:
    key = {"table": "speed", "bits": bits, "edges": options.edges, "threads": count, "batch": batch, "rounds": options.rounds}
    return {**base_key(name, options.device), **key, "peers": not options.skip_peers and options.device == "cpu"}


def processor(device: str) -> str:
    """Return the name of the processor that computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def rows_of(log: Path) -> list[Row]:
    """Return the rows that a log holds."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []


def speed_table(rows: list[Row]) -> str:
    """Return how many times faster the lowered network is than each column."""
    if not rows:
        return ""
    lines = [f"{rows[0]['processor']}, torch {rows[0]['versions']['torch']}. Ratios are time over lowered time: 2.00 is twice as fast.\n"]
    lines += [f"| network | bits | edges | threads | batch | lowered ms | {' | '.join(COLUMNS)} | logits apart | same class |"]
    lines += ["|---|---|---|---:|---:|---:|" + "---:|" * (len(COLUMNS) + 2)]
    reasons = []
    for row in rows:
        times = row["milliseconds"]
        cells = [f"{times[name] / times[LOWERED]:.2f}" if name in times else "-" for name in COLUMNS]
        where = f"| {row['network']} | {row['bits']} | {row['edges']} | {row['threads']} | {row['batch']} | {times[LOWERED]:.2f} "
        lines.append(f"{where}| {' | '.join(cells)} | {row['difference']:.1e} | {row['agreement']:.1%} of {row['compared']} |")
        reasons += [f"{name}, {row['network']}: {why}" for name, why in row["missing"].items()]
        if row["on"] != "integers":
            reasons.append(f"{row['network']}: nothing is lowered on this machine, the simulation was measured again")
    return "\n".join([*lines, "", *(f"- {reason}" for reason in dict.fromkeys(reasons))]) + "\n\n"


def size_table(rows: list[Row]) -> str:
    """Return megabytes, and the float ones over each."""
    if not rows:
        return ""
    lines = [f"| bytes | {' | '.join(SIZES)} |", "|---|" + "---:|" * len(SIZES)]
    for row in rows:
        before = row["bytes"][SIZES[0]]
        cells = [f"{row['bytes'][name]:,} (1/{before / row['bytes'][name]:.2f})" if name in row["bytes"] else "-" for name in SIZES]
        lines.append(f"| {row['network']} | {' | '.join(cells)} |")
    reasons = [f"- {name}, {row['network']}: {why}" for row in rows for name, why in row["missing"].items()]
    return "\n".join([*lines, "", *reasons]) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Draw the ratios as bars, a panel for bits and threads; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print('no plot: pip install "fxquant[plots]"')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((f"{row['bits']}, edges {row['edges']}", row["threads"]) for row in rows))
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 3.5 * len(panels)), squeeze=False)
    for axis, (bits, count) in zip(axes[:, 0], panels, strict=True):
        shown = [row for row in rows if (f"{row['bits']}, edges {row['edges']}", row["threads"]) == (bits, count)]
        for place, name in enumerate(COLUMNS):
            heights = [row["milliseconds"].get(name, 0) / row["milliseconds"][LOWERED] for row in shown]
            axis.bar([group + (place - 2.5) * 0.15 for group in range(len(shown))], heights, 0.14, label=name)
        axis.set_xticks(range(len(shown)), [f"{row['network']}\nbatch {row['batch']}" for row in shown], fontsize=7)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(title=f"{bits}, {count} thread(s)", ylabel="time over lowered")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
