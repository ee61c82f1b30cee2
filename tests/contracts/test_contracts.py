"""What we rely on in vLLM stands where the ledger says: in the installed version as it is, in others as it was recorded."""

import json
from pathlib import Path

import pytest
import snapshot
from reader import NotFound, Package

from vllm_dspark.engine import hooks

VERSIONS = sorted(path.stem.removeprefix("vllm-") for path in snapshot.FOLDER.glob("vllm-*.json"))


def test_every_supported_minor_version_has_a_snapshot() -> None:
    first, last = (int(version.split(".")[1]) for version in hooks.SUPPORTED.split(" to "))
    assert {version.rpartition(".")[0] for version in VERSIONS} == {f"0.{minor}" for minor in range(first, last + 1)}


def test_the_installed_vllm_is_the_one_that_was_recorded() -> None:
    pytest.importorskip("vllm")
    version = hooks.vllm_version()
    assert version in VERSIONS, f"run python tests/contracts/snapshot.py --write {version}"
    assert snapshot.differences(snapshot.read(version), snapshot.take(snapshot.installed())) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ledger_holds(version: str) -> None:
    kept = snapshot.read(version)
    assert snapshot.broken(kept) == []
    assert set(kept) == {hook.name for hook in hooks.HOOKS}, "take the snapshots anew: make contracts ARGS=--write"


# -- a vLLM made up to be read --

FILES = {
    "vllm/__init__.py": "",
    "vllm/base.py": """
class Base(Outside):
    size: int
    def __init__(self, config, *, device=None): self.rows = config["rows"]
    def inherited(self, one): return self.shared + "said"
    @property
    def wide(self): return [part.inner for part in self.outer]
""",
    "vllm/part/__init__.py": "from .made import Derived as Known, settings\n",
    "vllm/part/made.py": """
import os
from dataclasses import dataclass
from ..base import Base
try:
    from vllm.base import Base as Again
except ImportError:
    Again = None
class Derived(Base):
    def own(self, first, *rest, last=None, **more):
        '''Says nothing of absent.'''
        return self.kept
@dataclass
class Settings:
    name: str = ""
    size: int = 0
settings = Settings()
""",
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def rewrite(root: Path, name: str, old: str, new: str) -> None:
    content = (root / name).read_text()
    assert old in content
    (root / name).write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("module", "symbol", "where", "kind", "parameters"),
    [
        ("vllm.part.made", "Derived.own", "vllm.part.made", "function", ["self", "first", "*rest", "last", "**more"]),
        ("vllm.part.made", "Derived.inherited", "vllm.base", "function", ["self", "one"]),
        ("vllm.part", "Known.wide", "vllm.base", "property", ["self"]),
        ("vllm.part", "Known", "vllm.part.made", "class", ["self", "config", "device"]),
        ("vllm.part", "settings", "vllm.part.made", "class", ["name", "size"]),
        ("vllm.part.made", "Again", "vllm.base", "class", ["self", "config", "device"]),
        ("vllm", "part", "vllm.part", "module", []),
    ],
)
def test_a_symbol_is_followed_to_its_definition(
    made: Path, module: str, symbol: str, where: str, kind: str, parameters: list[str]
) -> None:
    said = Package(made).describe(module, symbol)
    assert (said["in"], said["kind"], said["parameters"]) == (where, kind, parameters)


@pytest.mark.parametrize(
    ("module", "symbol"), [("vllm.gone", "x"), ("vllm.base", "gone"), ("vllm.part", "Known.gone"), ("vllm.part.made", "os")]
)
def test_what_is_not_there_is_not_found(made: Path, module: str, symbol: str) -> None:
    with pytest.raises(NotFound):
        Package(made).find(module, symbol)


def test_names_are_those_of_the_code(made: Path) -> None:
    package = Package(made)
    assert {"part", "inner", "outer"} <= package.find("vllm.base", "Base.wide").names
    assert {"shared", "said"} <= package.find("vllm.base", "Base.inherited").names
    assert "kept" not in package.find("vllm.base", "Base.inherited").names


def test_only_code_changes_the_digest(made: Path) -> None:
    def digest() -> str:
        said: str = Package(made).describe("vllm.part.made", "Derived.own")["source"]
        return said

    before = digest()
    rewrite(made, "vllm/part/made.py", "Says nothing of absent.", "Says something else.")
    rewrite(made, "vllm/part/made.py", "return self.kept", "return  self.kept  # for long")
    assert digest() == before
    rewrite(made, "vllm/part/made.py", "self.kept", "self.moved")
    assert digest() != before


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {"purpose": "p", "loses": "l", "removal": "r"}
    made_up = (
        hooks.Hook("vllm.part.made", "Derived.own", **rest, parameters=("first", "rest"), mentions=("kept",)),
        hooks.Hook("vllm.part", "Known.inherited", **rest, parameters=("one",), mentions=("shared",)),
    )
    monkeypatch.setattr(hooks, "HOOKS", made_up)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("vllm/part/made.py", "first,", "renamed,", "vllm.part.made.Derived.own: no parameter first"),
        ("vllm/part/made.py", "self.kept", "self.moved", "vllm.part.made.Derived.own: no longer uses kept"),
        ("vllm/base.py", "def inherited", "def renamed", "vllm.part.Known.inherited: vllm.part.made.Derived has no inherited"),
        ("vllm/part/__init__.py", "as Known", "as Other", "vllm.part.Known.inherited: vllm.part has no Known"),
    ],
)
def test_what_breaks_the_ledger_is_named(made: Path, entries: None, name: str, old: str, new: str, said: str) -> None:
    before = snapshot.take(made)
    assert snapshot.broken(before) == []
    rewrite(made, name, old, new)
    after = snapshot.take(made)
    assert snapshot.broken(after) == [said]
    assert snapshot.differences(before, json.loads(json.dumps(before))) == []
    assert any(line.startswith(said.split(":")[0]) for line in snapshot.differences(before, after))


def test_an_entry_that_was_never_recorded_is_named(made: Path, entries: None) -> None:
    assert snapshot.broken({}) == [f"{hook.name}: not in the snapshot" for hook in hooks.HOOKS]
