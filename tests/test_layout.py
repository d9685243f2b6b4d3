"""Who may import whom: lower layers never import higher ones, and optional packages are imported when they are used."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import networks
import pytest
import torch

import qdiff_engine as qe

ROOT = Path(__file__).resolve().parent.parent
ENGINE, KERNELS = ROOT / "qdiff_engine", ROOT / "kernels" / "qdiff_kernels"

# lowest first; a module belongs to the layer of its file or folder directly below the package
LAYERS = (
    {"version", "numerics", "tables", "weights", "recipe", "plan_requests", "pair_requests", "memory"},
    {"reference", "_C"},
    {"ops"},
    {"graph", "samplers", "sampling", "rounding"},
    {
        "runtime", "calibration", "equalisation", "quantization", "correction", "evaluation", "measuring", "baselines",
        "benchmarking", "models", "pictures", "bops", "digits", "quality", "plans", "reporting", "alignment",
        "reconstruction",
    },
    {"cli"},
)  # fmt: skip
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, package: Path = ENGINE) -> Iterator[tuple[str, bool]]:
    """(absolute module, whether at import time) of every import statement, in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = [package.name, *path.relative_to(package).with_suffix("").parts]
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _type_checking(node)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        now = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = parents[: len(parents) - node.level] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            yield base, now
            yield from ((f"{base}.{alias.name}", now) for alias in node.names)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def unit(module: str) -> str | None:
    """The file or folder of the engine that a module lives in."""
    parts = module.split(".")
    return parts[1] if parts[0] == "qdiff_engine" and len(parts) > 1 and parts[1] in LEVEL else None


def unit_of(path: Path) -> str:
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def engine_files() -> list[Path]:
    return [path for path in sources(ENGINE) if path != ENGINE / "__init__.py"]


def test_every_module_has_a_layer() -> None:
    assert {unit_of(path) for path in engine_files()} | {"_C"} == set(LEVEL)


@pytest.mark.parametrize("path", engine_files(), ids=lambda p: str(p.relative_to(ENGINE)))
def test_lower_never_imports_higher(path: Path) -> None:
    mine = LEVEL[unit_of(path)]
    for module, _ in imports(path):
        other = unit(module)
        assert other is None or LEVEL[other] <= mine, f"{path.name} imports {module}"


def test_no_circles() -> None:
    """Neither between files at import time nor between folders at any time."""
    units: dict[str, set[str]] = {name: set() for name in LEVEL}
    files: dict[str, set[str]] = {}
    for path in engine_files():
        name = ".".join(["qdiff_engine", *path.relative_to(ENGINE).with_suffix("").parts]).removesuffix(".__init__")
        found = list(imports(path))
        files[name] = {module for module, now in found if now and module.startswith("qdiff_engine.")} - {name}
        units[unit_of(path)] |= {u for u in (unit(module) for module, _ in found) if u} - {unit_of(path)}
    assert list(TopologicalSorter(units).static_order())
    assert list(TopologicalSorter({k: v & files.keys() for k, v in files.items()}).static_order())


def test_every_package_is_installed() -> None:
    """`pip install .` takes the packages that are listed; in a checkout the others could be imported all the same."""
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11 and newer")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for path in ENGINE.rglob("__init__.py")]
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"qdiff_kernels"}


def test_only_ops_knows_backends() -> None:
    for path in engine_files():
        if unit_of(path) == "ops":
            continue
        for module, _ in imports(path):
            assert not module.startswith(("qdiff_kernels", "triton", "qdiff_engine._C"))
            own = ("onednn", "plain", "triton_kernels", "native_matmul", "native_products")
            assert not module.startswith(tuple(f"qdiff_engine.ops.{name}" for name in own))
        assert "torch.ops.onednn" not in path.read_text(encoding="utf-8")


def test_graph_and_sampling_do_not_know_each_other() -> None:
    for path in engine_files():
        units = {unit(module) for module, _ in imports(path)}
        assert not (unit_of(path) == "graph" and "sampling" in units)
        assert not (unit_of(path) == "sampling" and "graph" in units)


def test_optional_packages_are_imported_late() -> None:
    for path in sources(ENGINE):
        now = {module.split(".")[0] for module, now in imports(path) if now}
        assert not now & {"diffusers", "transformers", "matplotlib", "PIL", "triton", "openvino", "nncf"}, path
        if unit_of(path) != "cli":
            assert not now & {"click", "rich"}, path


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "qdiff_kernels"} | set(sys.stdlib_module_names)
    for path in sources(KERNELS):
        assert {module.split(".")[0] for module, _ in imports(path, KERNELS)} <= allowed, path


def test_csrc_includes_no_torch() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert files
    for path in files:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text(encoding="utf-8")), path


def test_no_bare_except_and_no_silent_pass() -> None:
    for path in [*sources(ENGINE), *sources(KERNELS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}"
                assert not all(isinstance(s, ast.Pass) for s in node.body), f"{path}:{node.lineno}"


def in_a_fresh_interpreter(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    loaded = json.loads(
        in_a_fresh_interpreter("import sys, json, qdiff_engine; print(json.dumps(sorted(sys.modules)))")
    )
    packages = {name.split(".")[0] for name in loaded}
    assert not packages & {"triton", "diffusers", "torch", "numpy", "matplotlib", "PIL", "click", "rich"}
    assert not {"qdiff_engine._C", "qdiff_engine.ops"} & set(loaded)


def test_names_of_the_package_load_on_first_use() -> None:
    assert qe.__all__ == sorted(qe.__all__) and set(qe.__all__) <= set(dir(qe))
    for name in qe.__all__:
        assert getattr(qe, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qe.quantise  # noqa: B018


_RUN_ALONE = """
import sys
for name in ("diffusers", "transformers", "matplotlib", "PIL", "click", "rich", "pytest"):
    sys.modules[name] = None  # any import of it fails
import torch, qdiff_engine as qe
torch.set_num_threads(int(sys.argv[2]))
model = qe.load(sys.argv[1])
x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
print(model(x, 250).sample.double().sum().item().hex(), qe.count_bops(model).total)
"""


def test_artifacts_run_with_nothing_but_torch(tmp_path: Path) -> None:
    """No diffusers, no command line, no pictures: load, run and count."""
    model = networks.integer_model("unet2d")
    model.save_pretrained(tmp_path / "artifact")
    x = networks.normal(2, 3, 16, 16)
    expected = model(x, 250).sample.double().sum().item().hex()
    total, bops = in_a_fresh_interpreter(_RUN_ALONE, str(tmp_path / "artifact"), str(torch.get_num_threads())).split()
    assert total == expected and float(bops) == qe.count_bops(model).total > 0
