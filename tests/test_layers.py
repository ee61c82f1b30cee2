"""Who may import whom: cli → engine → {heads, verification, checkpoint} → options, never upwards and never sideways."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vllm_dspark"
FLOORS = {
    "kinds": -1,
    "demo": 0,
    "options": 0,
    "heads": 1,
    "verification": 1,
    "checkpoint": 1,
    "metrics": 1,
    "engine": 2,
    "plugin": 3,
    "cli": 4,
    "__main__": 5,
}
VLLM_ROOMS = {"engine", "cli"}
LIGHT_ROOMS = {"kinds", "options", "checkpoint", "plugin"}  # in every vLLM process, so neither torch nor vllm at module level


class Import(NamedTuple):
    module: str  # absolute, e.g. "vllm_dspark.heads.modules"
    lazy: bool  # inside a function or under TYPE_CHECKING
    line: int


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """All imports below a node of a module in `package`, relative ones resolved; `from a import b` gives a.b."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, lazy, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*parents, *([child.module] if child.module else [])])
            yield from (Import(f"{base}.{alias.name}", lazy, child.lineno) for alias in child.names)
        else:
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from imports(child, package, lazy or deferred)


def room_of(module: str) -> str | None:
    """The room under vllm_dspark that a module lies in; None for the package itself and for others' modules."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "vllm_dspark" and rest and not rest.startswith("__version__") else None


def violations(source: str, room: str, package: str) -> list[str]:
    found = []
    for module, lazy, line in imports(ast.parse(source), package):
        target, top = room_of(module), module.split(".")[0]
        if target is not None and target != room and FLOORS.get(target, 9) >= FLOORS[room]:
            found.append(f"line {line}: {room} imports {target}")
        if top == "vllm" and room not in VLLM_ROOMS:
            found.append(f"line {line}: {room} imports vllm")
        if top in ("torch", "vllm") and room in LIGHT_ROOMS and not lazy:
            found.append(f"line {line}: {room} imports {top} at module level")
        if room == "verification" and top not in {"vllm_dspark", "numpy"} | sys.stdlib_module_names:
            found.append(f"line {line}: verification imports {top}")
    return found


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    inside = path.relative_to(PACKAGE)
    room = inside.parts[0].removesuffix(".py")
    assert room in FLOORS, f"give {room} a floor in FLOORS"
    assert violations(path.read_text(), room, ".".join(["vllm_dspark", *inside.parent.parts])) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("options", "from vllm_dspark.heads import modules"),
        ("options", "from . import checkpoint"),
        ("heads", "from ..engine.hooks import HOOKS"),
        ("heads", "def f():\n    from vllm.config import VllmConfig"),
        ("heads", "from vllm_dspark import verification"),
        ("verification", "import torch"),
        ("verification", "def f():\n    import scipy.stats"),
        ("checkpoint", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("plugin", "import vllm"),
        ("engine", "import vllm_dspark.cli"),
    ],
)
def test_a_planted_violation_is_found(room, source):
    package = "vllm_dspark" if room in ("options", "checkpoint", "plugin") else f"vllm_dspark.{room}"
    assert violations(source, room, package)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("heads", "import torch\nfrom ..options import DSparkOptions\nfrom .reference import markov"),
        ("verification", "import math\nimport numpy as np\nfrom vllm_dspark import __version__"),
        ("checkpoint", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
        ("engine", "import vllm\nfrom vllm_dspark.verification.policy import Policy"),
    ],
)
def test_an_allowed_import_is_let_through(room, source):
    package = "vllm_dspark" if room == "checkpoint" else f"vllm_dspark.{room}"
    assert violations(source, room, package) == []


@pytest.mark.parametrize("module", sorted(LIGHT_ROOMS))
def test_light_rooms_load_neither_torch_nor_vllm(module):
    """The same claim at run time, which also sees what third parties import."""
    program = f"import sys, vllm_dspark.{module}; print(sorted({{'torch', 'vllm'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
