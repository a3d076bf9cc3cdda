"""fxquant.passes is found wherever fxquant is: installed for editing, from a wheel, uninstalled in the checkout, and by type checkers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOW = "import fxquant, fxquant.passes, fxquant.tracing; print(fxquant.__file__); print(fxquant.passes.__file__); fxquant.passes.Freeze"


def run(*command: str | Path, cwd: Path, path: str | None = None, fails: bool = False) -> str:
    """Run a command with nothing of this process' Python path; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True, timeout=600)
    assert fails or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files that are under version control or will be, so that a build leaves nothing here."""
    copy = tmp_path_factory.mktemp("checkout") / "fxquant"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fxquant", "passes"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-R", "-P", ROOT / name, copy], check=True)
    if not (copy / "README.md").exists():
        (copy / "README.md").write_text("fxquant\n", encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    _needs("setuptools", "pip")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, checkout, cwd=folder)
    return next(folder.glob("fxquant-*.whl"))


def _needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


# The tree


def test_top_level():
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    generated = {"build", "dist", "fxquant.egg-info", "__pycache__"}
    assert visible - generated - {"LICENSE"} <= {"pyproject.toml", "fxquant", "passes", "tests", "examples", "README.md"}
    assert {"pyproject.toml", "fxquant", "passes", "tests"} <= visible


def test_the_link_is_relative():
    link = ROOT / "fxquant" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"
    assert not (ROOT / "passes").is_symlink()


def test_packages_are_those_of_the_tree(project):
    tools = project["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "fxquant").rglob("__init__.py") if "passes" not in path.relative_to(ROOT).parts}
    own = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    passes = {".".join(["fxquant", *path.parent.relative_to(ROOT).parts]) for path in (ROOT / "passes").rglob("__init__.py")}
    assert set(tools["packages"]) == own | passes
    assert tools["package-dir"] == {"": "."}
    code = {path.parent for root in ("fxquant", "passes") for path in (ROOT / root).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in code)


def test_dependencies(project):
    core = {requirement.split(">")[0].split("=")[0].split("<")[0].strip() for requirement in project["project"]["dependencies"]}
    assert core == {"torch", "torchvision", "timm", "numpy", "safetensors", "rich"}


def test_the_version_is_told_once(project):
    import fxquant

    assert project["project"]["version"] == fxquant.__version__


# The four ways to import


def test_from_the_root_without_an_install():
    here, passes = run(sys.executable, "-c", SHOW, cwd=ROOT).split()
    assert Path(here) == ROOT / "fxquant" / "__init__.py"
    assert Path(passes).resolve() == ROOT / "passes" / "__init__.py"


@pytest.mark.slow
def test_installed_for_editing(checkout, tmp_path):
    _needs("setuptools", "pip")
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, "-e", checkout, cwd=elsewhere)
    # --target is no site directory: its .pth files are read only when it is added as one
    code = f"import site, sys; sys.path.insert(0, {str(target)!r}); site.addsitedir({str(target)!r}); {SHOW}"
    for place in (elsewhere, checkout.parent):  # beside the checkout, whose name is that of the package
        here, passes = run(sys.executable, "-S", "-c", _with_site_packages(code), cwd=place).split()
        assert Path(here).resolve() == (checkout / "fxquant" / "__init__.py").resolve()
        assert Path(passes).resolve() == (checkout / "passes" / "__init__.py").resolve()
    (checkout / "passes" / "added.py").write_text("VALUE = 7\n", encoding="utf-8")
    code = code.replace(SHOW, "from fxquant.passes.added import VALUE; print(VALUE)")
    assert run(sys.executable, "-S", "-c", _with_site_packages(code), cwd=elsewhere).strip() == "7"
    (checkout / "passes" / "added.py").unlink()


def _with_site_packages(code: str) -> str:
    """Add the folders with torch behind the ones `code` adds, without the .pth files there (another fxquant may be installed)."""
    folders = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return code.replace("import site, sys;", f"import site, sys; sys.path += {folders!r};", 1)


@pytest.mark.slow
def test_a_wheel_in_another_folder(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    here, passes = run(sys.executable, "-c", SHOW, cwd=elsewhere, path=str(target)).split()
    assert Path(here) == target / "fxquant" / "__init__.py"
    assert Path(passes) == target / "fxquant" / "passes" / "__init__.py"
    assert not (target / "passes").exists()
    assert (target / "fxquant" / "py.typed").is_file()


@pytest.mark.slow
def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fxquant"}
    held = {name for name in names if name.endswith(".py")}
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "fxquant").rglob("*.py") if "passes" not in path.relative_to(ROOT).parts}
    assert held == own | {f"fxquant/{path.relative_to(ROOT)}" for path in (ROOT / "passes").rglob("*.py")}
    assert {name for name in names if name.endswith(".cpp")} == {str(path.relative_to(ROOT)) for path in (ROOT / "fxquant").rglob("*.cpp")}


SNIPPET = """
from fxquant.passes import Freeze, FoldBatchNorm
from fxquant.passes.append_cat import logits_node
reveal_type(Freeze.verb)
reveal_type(logits_node)
Freeze.no_such_attribute
"""


@pytest.mark.slow
def test_mypy_finds_passes_in_the_checkout(tmp_path):
    _needs("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET, encoding="utf-8")
    # From the root, without an install: resolution goes through the link, as in pyright and in editors.
    options = ("--no-incremental", "--ignore-missing-imports", "--follow-imports", "silent", "--cache-dir", tmp_path / "cache")
    text = run(sys.executable, "-m", "mypy", *options, snippet, cwd=ROOT, path=str(ROOT), fails=True)
    assert "Cannot find implementation" not in text
    assert 'Revealed type is "str"' in text or 'Revealed type is "builtins.str"' in text, text
    assert "GraphModule" in text
    assert '"type[Freeze]" has no attribute "no_such_attribute"' in text
