"""The two rooms and the one direction between them: read from the source, without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = {"quantize", "lower", "learning", "correction", "storage", "reporting", "cli", "cli_deploy", "demo", "__init__"}
"""Files of fxquant/ that tell the story: they may import everything."""

PRIVATE = {
    "torch._dynamo": "deploy: one graph for all batch sizes from the first call on",
    "torch._inductor": "deploy: freezing, the hook behind the other graph passes, its compiler and its cache folder have no public names",
    "torch._int_mm": "deploy: the product of int8 matrices; torch names no public one",
    "torch._ops": "deploy: OpOverload, whose schema says which operations give views",
    "torch._C": "tracing: DisableTorchFunction, which keeps a module call from being recorded twice",
    "torch._assert": "a function that traced networks call; it is recognized, not used",
    "torch._dispatch": "tracing: keeps the batch size symbolic through operations that are only decomposed in Python",
    "torch._prims_common": "tracing: the memory order in which batch norms allocate",
    "torch._subclasses": "tracing: fake tensors, on which shape control flow resolves",
    "torch.fx.experimental": "tracing: the shape environment that keeps the batch size symbolic",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "coverage: what attention becomes on processors, to count its work",
    "torch.nn.modules.batchnorm": "_BatchNorm, the base class of all batch norms; torch names no public one",
    "torch.nn.modules.conv": "_ConvNd and _ConvTransposeNd, the base classes of all convolutions",
}
"""What is used of torch that is not public, and why it is needed all the same."""


def files() -> list[Path]:
    own = [path for path in (ROOT / "fxquant").rglob("*.py") if "passes" not in path.relative_to(ROOT / "fxquant").parts]
    return sorted([*own, *(ROOT / "passes").glob("*.py")])


def room(path: Path) -> str:
    """Return "top", "passes" or "blocks" for a file."""
    if path.parent == ROOT / "passes":
        return "passes"
    return "top" if path.parent == ROOT / "fxquant" and path.stem in TOP else "blocks"


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the dotted name and the line of everything a file imports, at the top or inside a function."""
    package = ["fxquant", *path.relative_to(ROOT / "fxquant" if ROOT / "fxquant" in path.parents else ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def room_of_name(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "fxquant":
        return None
    if len(parts) > 1 and parts[1] == "passes":
        return "passes"
    return "top" if len(parts) == 1 or parts[1] in TOP or not _is_inside(parts[1]) else "blocks"


def _is_inside(name: str) -> bool:
    return (ROOT / "fxquant" / name).is_dir() or (ROOT / "fxquant" / f"{name}.py").is_file()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    allowed = {"top": {"top", "passes", "blocks"}, "passes": {"passes", "blocks"}, "blocks": {"blocks"}}[room(path)]
    for name, line in imported(path):
        there = room_of_name(name)
        assert there is None or there in allowed, f"{path}:{line} is of {room(path)} and imports {name} of {there}"


def test_the_rule_notices():
    """`from fxquant import x`, a relative import and a pass are each told apart."""
    assert room_of_name("fxquant.quantize") == "top"
    assert room_of_name("fxquant.report") == "top"
    assert room_of_name("fxquant.passes.Freeze") == "passes"
    assert room_of_name("fxquant.graph.kind") == "blocks"
    assert room_of_name("fxquant.cat.fit.fit_cat") == "blocks"
    assert room_of_name("torch.nn") is None
    names = dict(imported(ROOT / "fxquant" / "tracing" / "__init__.py"))
    assert "fxquant.tracing.leaves.unwrap" in names
    assert {room(path) for path in files()} == {"top", "passes", "blocks"}


def private(path: Path) -> Iterator[tuple[str, int]]:
    """Yield what a file imports or names of torch and timm that is private or experimental."""
    for name, line in [*imported(path), *named(path)]:
        hidden = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
        if name.startswith(("torch", "timm")) and (hidden or "experimental" in name):
            yield name, line


def named(path: Path) -> Iterator[tuple[str, int]]:
    """Yield dotted names that begin with torch, ``nn`` written out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if text.startswith(("torch.", "nn.")) and text.replace(".", "").replace("_", "").isalnum():
            yield text if text.startswith("torch.") else f"torch.{text}", node.lineno


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_torch(path):
    for name, line in private(path):
        assert any(name.startswith(known) for known in PRIVATE), f"{path}:{line} uses {name}, which is not public"


def test_every_exception_is_used():
    used = {name for path in files() for name, _ in private(path)}
    assert [known for known in PRIVATE if not any(name.startswith(known) for name in used)] == []


@pytest.mark.parametrize("path", [*files(), *sorted((ROOT / "fxquant").rglob("*.cpp"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    most, lines = 200 if room(path) == "passes" else 400, path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= most
    assert path.suffix == ".py" or max(map(len, lines)) <= 140, "ruff looks at Python alone"


def test_the_story_fits_a_page():
    assert len((ROOT / "fxquant" / "quantize.py").read_text(encoding="utf-8").splitlines()) <= 130


def test_no_placeholder_is_left_in_the_readme():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines
    assert [line for line in lines if re.search(r"\b[A-Z]+_TABLE\b", line)] == []
