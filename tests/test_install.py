"""The built wheel is complete, and installs beside a vLLM that is already there without touching it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_dspark"
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command run outside the checkout, so that nothing is imported from there."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS", "VLLM_DSPARK")}
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def package_files() -> set[str]:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build reads: a build in the checkout would leave, and later pick up, its own build/ folder."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGE, folder / "vllm_dspark", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source, cwd=out)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def beside_vllm(tmp_path_factory) -> Path:
    """A new environment that sees every package of this one, vLLM among them, but no vllm_dspark."""
    base = tmp_path_factory.mktemp("beside")
    others = base / "others"
    others.mkdir()
    for entry in SITE_PACKAGES.iterdir():
        if "vllm_dspark" not in entry.name:
            (others / entry.name).symlink_to(entry)
    venv.create(base / "env", with_pip=True, symlinks=True)
    (own,) = (base / "env").glob("lib/python*/site-packages")
    (own / "others.pth").write_text(f"{others}\n")
    return base / "env"


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == package_files()
    assert "vllm_dspark/py.typed" in packed
    assert any(name.startswith("vllm_dspark/demo/") and name.endswith(".safetensors") for name in packed)


def test_wheel_declares_plugin_script_and_licence(wheel):
    entry_points = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "[vllm.general_plugins]\ndspark = vllm_dspark.plugin:register" in entry_points
    assert "[console_scripts]\nvllm-dspark = vllm_dspark.cli:main" in entry_points
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_lock_has_what_the_project_asks_for_and_none_of_what_cannot_load():
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, [*project["dependencies"], *extras["cpu"], *extras["test"], *extras["dev"]])
    versions = {requirement.name.replace("_", "-"): requirement.specifier for requirement in asked}
    del versions["vllm-dspark"]
    assert not {name for name, specifier in versions.items() if pins.get(name) not in specifier}
    assert not {"torchvision", "torchaudio", "torchcodec"} & pins.keys()


def test_plain_pip_install_beside_vllm(beside_vllm, source, tmp_path):
    python = beside_vllm / "bin" / "python"
    (own,) = beside_vllm.glob("lib/python*/site-packages")
    before = {path.name for path in own.iterdir()}

    run(python, "-m", "pip", "install", source, cwd=tmp_path)

    added = {path.name for path in own.iterdir()} - before
    assert {name.split("-")[0] for name in added} == {"vllm_dspark"}, "a package that vLLM already has was installed again"
    program = """
import importlib.metadata, pathlib
from vllm.plugins import load_plugins_by_group
import vllm, vllm_dspark
(entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="dspark")
register = load_plugins_by_group("vllm.general_plugins")["dspark"]
assert register is entry.load()
register()
register()
demo = pathlib.Path(vllm_dspark.__file__).parent / "demo"
assert list(demo.rglob("*.safetensors")), "no bundled pair"
print("imported from", vllm_dspark.__file__)
"""
    printed = run(python, "-c", program, cwd=tmp_path)
    assert f"imported from {own}/" in printed

    version = run(python, "-c", "import vllm_dspark; print(vllm_dspark.__version__)", cwd=tmp_path).strip()
    script = beside_vllm / "bin" / "vllm-dspark"
    assert version in run(script, "--version", cwd=tmp_path)
    assert "demo" in run(script, "--help", cwd=tmp_path)
