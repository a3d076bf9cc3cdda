"""The commands of deployment, what they measure with, and the examples that serve and compare: without compiling."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import fxquant
from fxquant import cli, cli_deploy
from fxquant.deploy import compiled, cpu, latency

NAME = "test_resnet"
NAMES = ("float32, eager", "float32, compiled", "bfloat16, compiled", "simulated, compiled", "lowered, compiled")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized network for 64 px, and two photos."""
    root = tmp_path_factory.mktemp("deploy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(NAME, pretrained=False, num_classes=3).eval()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fxquant.save(fxquant.quantize(model, [images], 2, 2, cat=False, recipe="fast", progress=False), root / "q.safetensors")
    (root / "photos").mkdir()
    for index in range(2):
        Image.effect_noise((180, 170), 40 + 30 * index).convert("RGB").save(root / "photos" / f"{index}.png")
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Nothing is compiled and nothing timed; the (threads, batch) of every measurement."""
    seen: list[tuple[int, int]] = []

    def latencies(networks: dict[str, Any], images: Tensor, rounds: int) -> dict[str, float]:
        seen.append((torch.get_num_threads(), len(images)))
        assert images.is_contiguous(memory_format=torch.channels_last)
        return {name: float(10 - place) for place, name in enumerate(networks)}

    monkeypatch.setattr(compiled, "compile", lambda network, cuda_graphs: network)
    monkeypatch.setattr(latency, "frozen", lambda network, cuda_graphs: network)
    monkeypatch.setattr(latency, "latencies", latencies)
    return seen


def run(command: str, *words: str | Path) -> int:
    return cli.main([command, "--model", NAME, "--num-classes", "3", "--quiet", *map(str, words)])


def message(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Return what was printed to stderr behind a command that failed, on one line."""
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def rows(out: str) -> dict[str, str]:
    """Return the cells of a table without header, by the first one."""
    found = (re.findall(r"[^│]+", line) for line in out.splitlines() if line.startswith("│"))
    return {cells[0].strip(): cells[1].strip() for cells in found}


@pytest.mark.parametrize("words", [[], ["--clip"]])
def test_export_onnx(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    path = tmp_path / "q.onnx"
    assert run("export", place / "q.safetensors", "--onnx", path, *words) == 0
    found = rows(capsys.readouterr().out)
    assert found["bytes"] == f"{path.stat().st_size:,}"
    assert int(found["operator set"]) == (18 if words else 25)
    assert found["compared on"] == "random images, batches of 4 and 1"
    assert float(found["relative error"]) < 0.1
    assert found["same arg-max"].endswith("%")


def test_export_pt2(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.pt2"
    assert run("export", place / "q.safetensors", "--pt2", path) == 0
    found = rows(capsys.readouterr().out)
    assert found["bytes of the quantized file"] == f"{(place / 'q.safetensors').stat().st_size:,}"
    assert found["largest difference"] == "0" and "operator set" not in found
    assert torch.export.load(path).module()(torch.zeros(5, 3, 64, 64)).shape == (5, 3)


def test_export_compares_on_images_of_the_size_of_the_calibration(place: Path, tmp_path: Path, capsys) -> None:
    code = run("export", place / "q.safetensors", "--pt2", tmp_path / "q.pt2", "--data", place / "photos")
    assert "images is [2, 3, 160, 160], the network was calibrated with [N, 3, 64, 64]" in message(capsys, code)
    assert not (tmp_path / "q.pt2").exists()


def test_export_compares_on_images(tmp_path: Path, place: Path, capsys) -> None:
    model = timm.create_model(NAME, pretrained=False, num_classes=3).eval()
    recipe = fxquant.Recipe.FAST.replace(stages=("ranges",))
    qmodel = fxquant.quantize(model, [torch.randn(4, 3, 160, 160)], 2, 2, cat=False, recipe=recipe, progress=False)
    fxquant.save(qmodel, tmp_path / "q.safetensors")
    assert run("export", tmp_path / "q.safetensors", "--pt2", tmp_path / "q.pt2", "--data", place / "photos") == 0
    assert rows(capsys.readouterr().out)["compared on"].startswith(str(place / "photos")[:20])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["FILE", "--pt2", "OUT", "--clip"], "--clip: is a form of ONNX. Use --onnx instead of --pt2"),
        (["FILE", "--onnx", "nowhere/q.onnx"], "nowhere/q.onnx: its folder does not exist"),
        (["nowhere", "--onnx", "OUT"], "nowhere"),
        (["FILE", "--pt2", "OUT", "--num-classes", "5"], "q.safetensors"),
        (["FILE", "--pt2", "OUT", "--data", "nowhere"], "nowhere: is no folder"),
    ],
)
def test_export_bad_input(place: Path, tmp_path: Path, capsys, words: list[str], expected: str) -> None:
    given = {"FILE": str(place / "q.safetensors"), "OUT": str(tmp_path / "out")}
    assert expected in message(capsys, run("export", *(given.get(word, word) for word in words)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--onnx", "a", "--pt2", "b"]])
def test_export_writes_one_file(place: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("export", place / "q.safetensors", *words)
    assert stop.value.code == 2


def test_export_names_the_extra(place: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    code = run("export", place / "q.safetensors", "--onnx", tmp_path / "q.onnx")
    assert 'pip install "fxquant[onnx]"' in message(capsys, code)


def test_bench_of_a_file(place: Path, tmp_path: Path, capsys, quick: list[tuple[int, int]]) -> None:
    pytest.importorskip("matplotlib")
    before = torch.get_num_threads()
    words = ["--batches", "1", "4", "--threads", "1", "2", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    assert run("bench", place / "q.safetensors", *words) == 0
    assert quick == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    for count in ("1 thread", "2 threads"):
        assert f"{NAME}, W2A2, torch {torch.__version__}, {count}" in " ".join(out.split())
    assert out.count("lowered, compiled") == 2
    assert re.search(r"float32, compiled\s+│\s+9\.00\s+│\s+1\.50x\s+│\s+9\.00", out)
    data = json.loads((tmp_path / "a.json").read_text())
    assert [(row["threads"], row["batch"]) for row in data["rows"]] == quick
    assert tuple(data["rows"][0]["milliseconds"]) == NAMES
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_bench_of_a_name(capsys, quick: list[tuple[int, int]]) -> None:
    assert cli.main(["bench", "--arch", NAME, "--w", "4", "--a", "8", "--quiet"]) == 0
    assert quick == [(torch.get_num_threads(), 1)]
    out = capsys.readouterr().out
    assert "W4A8" in out
    if cpu.unavailable() is None:
        assert re.search(r"\d+ layers on integers; simulated: ", out)


def test_bench_says_when_the_simulation_stays(place: Path, capsys, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "this processor is a toaster")
    assert run("bench", place / "q.safetensors") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing is lowered, that row is the simulation again" in out
    assert "this processor is a toaster" in out


def test_bench_of_weights_alone(tmp_path: Path, capsys, quick) -> None:
    model = timm.create_model(NAME, pretrained=False, num_classes=3).eval()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fxquant.save(fxquant.quantize(model, [images], 2, None, cat=False, recipe="fast", progress=False), tmp_path / "w.safetensors")
    assert run("bench", tmp_path / "w.safetensors") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing is lowered, that row is the simulation again; ResNet: has nothing to lower" in out


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_bench_with_other_edges(capsys, quick) -> None:
    assert cli.main(["bench", "--arch", NAME, "--edges", "integer", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "layers on integers" in out and "is not quantized" not in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["FILE", "--edges", "integer"], "--edges: FILE has bits of its own. Leave it out, or leave out the file"),
        (["FILE", "--w", "4"], "--w: FILE has bits of its own. Leave it out, or leave out the file"),
        (["--w", "9"], "9 bits are not supported"),
        (["FILE", "--json", "nowhere/a.json"], "nowhere/a.json: its folder does not exist"),
        (["nowhere"], "nowhere"),
        (["--model", "resnet81"], "Did you mean resnet18"),
        (["FILE", "--plot", "OUT.what"], "Use an ending such as .png or .svg"),
        (["FILE", "--device", "toaster"], "device: 'toaster' cannot be used"),
        (["FILE", "--device", "meta"], "device: 'meta' holds no data"),
        (["FILE", "--cuda-graphs"], "--cuda-graphs: is for GPUs. Add --device cuda, or leave it out"),
    ],
)
def test_bench_bad_input(place: Path, tmp_path: Path, capsys, quick, words: list[str], expected: str) -> None:
    given = {"FILE": str(place / "q.safetensors"), "OUT.what": str(tmp_path / "out.what")}
    text = message(capsys, run("bench", *(given.get(word, word) for word in words)))
    assert expected.replace("FILE", given["FILE"]) in text


def test_bench_on_a_device_without_kernels(place: Path, capsys, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_deploy, "working_device", lambda model, device: torch.device(device))
    text = message(capsys, run("bench", place / "q.safetensors", "--device", "xpu"))
    assert "--device: there are no integer kernels for xpu. Use cpu or cuda" in text
    assert quick == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", [[], ["--cuda-graphs"]])
def test_bench_on_a_gpu(place: Path, tmp_path: Path, capsys, words: list[str]) -> None:
    given = ["--device", "cuda", "--batches", "1", "4", "--rounds", "1", "--json", tmp_path / "a.json", *words]
    assert run("bench", place / "q.safetensors", *given) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert torch.cuda.get_device_name() in out and "layers on integers" in out
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["cuda_graphs"] is bool(words)
    for row in data["rows"]:
        assert tuple(row["milliseconds"]) == NAMES and min(row["milliseconds"].values()) > 0


def test_bench_names_the_extra(place: Path, tmp_path: Path, capsys, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code = run("bench", place / "q.safetensors", "--plot", tmp_path / "a.png")
    assert 'pip install "fxquant[plots]"' in message(capsys, code)
    assert quick == [], "it said so behind the measurement"


def test_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in ((["--help"], "fxquant export"), (["export", "--help"], "--clip"), (["bench", "--help"], "--rounds")):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_latencies_are_medians_of_turns_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = 0.0, list[str]()
    monkeypatch.setattr(latency, "TURN", 3)

    def takes(name: str, *seconds: float) -> Any:
        left = list(seconds)

        def network(images: Tensor) -> None:
            nonlocal clock
            assert not torch.is_grad_enabled()
            calls.append(name)
            clock += left.pop(0) if calls.count(name) > latency.WARM_UP else 100

        return network

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock)
    times = {"a": takes("a", 100, 1, 7, 100, 5, 2), "b": takes("b", 100, 0.5, 0.25, 100, 0.125, 1)}
    found = latency.latencies(times, torch.zeros(1), 2)
    assert found == {"a": 3500, "b": 375}, "the first call of a turn does not count"
    assert "".join(calls) == "aaabbbaaabbbaaabbb"


def test_variants_compute_the_same(make_net, images, untouched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compile", lambda network, cuda_graphs: network)
    monkeypatch.setattr(latency, "frozen", lambda network, cuda_graphs: network)
    net = make_net()
    qmodel = fxquant.quantize(net, images, 8, 8, cat=False, recipe="fast", progress=False)
    with untouched(net), torch.no_grad():
        networks = latency.variants(net, qmodel, qmodel)
        outputs = {name: network(images[0]) for name, network in networks.items()}
    assert tuple(networks) == NAMES and cli_deploy.BASE in NAMES
    for output in outputs.values():
        assert output.dtype == torch.float32
        assert (output - outputs["float32, eager"]).abs().max() < 0.1 * outputs["float32, eager"].abs().max()


@pytest.mark.slow
def test_variants_compile(make_net, images) -> None:
    net = make_net()
    qmodel = fxquant.quantize(net, images, 8, 8, cat=False, recipe="fast", progress=False)
    with latency.threads(1):
        found = latency.latencies(latency.variants(net, qmodel, fxquant.lower(qmodel)), images[0], 2)
    assert tuple(found) == NAMES and min(found.values()) > 0


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with latency.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def example(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name[:2]}", EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    sys.path.insert(0, str(EXAMPLES))  # as it is where the example is run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def test_the_server_takes_what_waits() -> None:
    module = example("08_deploy.py")
    server = module.Server(lambda images: images.flatten(1) * 2, (1, 2, 2), 2)
    requests = [module.Request(torch.full((1, 2, 2), float(number))) for number in range(5)]
    for request in (*requests, None):
        server.requests.put(request)
    server.serve()
    assert server.sizes == {2: 2, 1: 1}
    assert [request.answer.result(0).tolist() for request in requests] == [[2.0 * number] * 4 for number in range(5)]


def test_an_image_of_another_shape_fails_alone() -> None:
    module = example("08_deploy.py")
    server = module.Server(lambda images: images.flatten(1), (1, 2, 2), 4)
    answer = server.submit(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"of shape \[1, 3, 2\], and the server takes \[1, 2, 2\]"):
        server.submit(torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="of uint8, and the server takes normalized floats"):
        server.submit(torch.ones(1, 2, 2, dtype=torch.uint8))
    half = server.submit(torch.ones(1, 2, 2).half())
    server.requests.put(None)
    server.serve()
    assert answer.result(0).tolist() == [1.0] * 4
    assert half.result(0).dtype == torch.float32, "a batch of halves would be compiled anew"


def test_the_server_outlives_a_batch_that_fails() -> None:
    module = example("08_deploy.py")

    def network(images: Tensor) -> Tensor:
        if images.isnan().any():
            raise ValueError("not a number")
        return images.flatten(1)

    server = module.Server(network, (1, 1, 1), 1)
    good, bad = module.Request(torch.ones(1, 1, 1)), module.Request(torch.full((1, 1, 1), torch.nan))
    for request in (bad, good, None):
        server.requests.put(request)
    server.serve()
    with pytest.raises(ValueError, match="not a number"):
        bad.answer.result(0)
    assert good.answer.result(0).item() == 1


def test_the_server_warms_up_every_size() -> None:
    seen = list[int]()
    module = example("08_deploy.py")
    module.Server(lambda images: seen.append(len(images)), (1, 1, 1), 5).warm_up()
    assert seen == [1, 2, 3, 4, 5]


def test_the_benchmark_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    module = example("09_benchmark_deployment.py")
    done: list[tuple[str, Any]] = []

    def speed(case: str, key: dict[str, Any], rounds: int) -> dict[str, Any]:
        done.append((case, (key["bits"], key["threads"], key["batch"])))
        times = {"float32, compiled": 8.0, "bfloat16, compiled": 4.0, "simulated, compiled": 9.0, "lowered, compiled": 2.0}
        times["onnxruntime int8"] = 3.0
        found = {"milliseconds": times, "missing": {"torchao int8": "ImportError: none"}, "on": "integers"}
        return {**found, "difference": 1e-7, "agreement": 1.0, "compared": 64}

    def sizes(case: str) -> dict[str, Any]:
        done.append((case, "sizes"))
        return {"bytes": {"float state_dict": 4000, "file W2": 300}, "missing": {}}

    for name, fake in (("Case", lambda name, device: name), ("speed", speed), ("sizes", sizes)):
        monkeypatch.setattr(module, name, fake)
    words = ["--networks", "resnet18", "--bits", "W2A2", "--batches", "1", "8", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["09", *words])
    module.main()
    assert done == [("resnet18", ("W2A2", 1, 1)), ("resnet18", ("W2A2", 1, 8)), ("resnet18", "sizes")]
    text = (tmp_path / "runs.md").read_text()
    assert "| resnet18 | W2A2 | integer | 1 | 8 | 2.00 | 4.00 | - | 2.00 | 4.50 | 1.50 | - | 1.0e-07 | 100.0% of 64 |" in text
    assert "- torchao int8, resnet18: ImportError: none" in text
    assert "| resnet18 | 4,000 (1/1.00) | - | - | 300 (1/13.33) |" in text
    assert (tmp_path / "runs.png").stat().st_size > 1000
    done.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["09", *words[:-4], *words[-2:], "--device", "cuda"])
    module.main()
    assert done == [("resnet18", ("W2A2", 1, 1)), ("resnet18", ("W2A2", 1, 8)), ("resnet18", "sizes")], "the CPU's numbers are not a GPU's"
    assert (tmp_path / "runs.md").read_text().startswith("a GPU, torch")
    done.clear()
    monkeypatch.setattr(sys, "argv", ["09", *words, "--threads", "1", "2"])
    module.main()
    assert done == [("resnet18", ("W2A2", 2, 1)), ("resnet18", ("W2A2", 2, 8))]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8


def test_the_benchmark_needs_the_device_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["09", "--device", "cuda", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        example("09_benchmark_deployment.py").main()
    assert "--device cuda: there is none that torch can use" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
