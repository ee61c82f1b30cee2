"""Takes and checks snapshots of the vLLM symbols in the ledger (``vllm-<version>.json`` beside this file).

    python tests/contracts/snapshot.py                    check the installed vLLM
    python tests/contracts/snapshot.py 0.33.0 ...         check others, from their wheels on the package index
    python tests/contracts/snapshot.py --write 0.33.0     take them anew
    python tests/contracts/snapshot.py --tree DIR 0.33.0  from an unpacked wheel

Another version's Python files are also put before the installed ones while the tests run that need no engine; with --tree
they are not. Exit status 1 if a snapshot differs, the ledger does not hold or a test fails.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent.parent)]

from reader import NotFound, Package  # noqa: E402

from vllm_dspark.engine import hooks  # noqa: E402

# Wheels name the oldest C library they run with; their Python files are the same.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 31, 34, 35)] + ["manylinux1_x86_64", "manylinux2014_x86_64"]

# Of the V2 runner: what is used of vLLM there is Python, and needs neither a device nor its compiled parts.
TESTS = [f"tests/test_v2_{name}.py" for name in ("costs", "graphs", "lossless", "rounds", "speculator", "verification")]

Snapshot = dict[str, dict[str, Any]]


def take(root: Path) -> Snapshot:
    """What the ledger's symbols are in the vLLM under ``root``; ``missing`` says why where there is none."""
    package, taken = Package(root), {}
    for hook in hooks.HOOKS:
        try:
            said = package.describe(hook.module, hook.symbol)
            names = package.find(hook.module, hook.symbol).names
            taken[hook.name] = {**said, "mentions": [name for name in hook.mentions if name in names]}
        except NotFound as error:
            taken[hook.name] = {"missing": str(error)}
    return dict(sorted(taken.items()))


def broken(snapshot: Snapshot) -> list[str]:
    """Where the ledger does not hold in a snapshot, one sentence each."""
    problems = []
    for hook in hooks.HOOKS:
        said = snapshot.get(hook.name)
        if said is None or "missing" in said:
            problems.append(f"{hook.name}: {'not in the snapshot' if said is None else said['missing']}")
            continue
        takes = {name.lstrip("*") for name in said["parameters"]}
        lacking = [name for name in hook.parameters if name not in takes]
        unsaid = [name for name in hook.mentions if name not in said["mentions"]]
        problems += [f"{hook.name}: no parameter {', '.join(lacking)}"] if lacking else []
        problems += [f"{hook.name}: no longer uses {', '.join(unsaid)}"] if unsaid else []
    return problems


def differences(kept: Snapshot, now: Snapshot) -> list[str]:
    """What has changed between two snapshots, one sentence each."""
    changed = []
    for name in sorted(kept.keys() | now.keys()):
        before, after = kept.get(name, {}), now.get(name, {})
        for what in sorted(before.keys() | after.keys()):
            if before.get(what) != after.get(what):
                changed.append(f"{name}: {what} was {before.get(what)}, is {after.get(what)}")
    return changed


def path(version: str) -> Path:
    return FOLDER / f"vllm-{version}.json"


def read(version: str) -> Snapshot:
    kept: Snapshot = json.loads(path(version).read_text())
    return kept


def installed() -> Path:
    """The folder that holds the installed ``vllm``."""
    found = importlib.util.find_spec("vllm")
    assert found is not None, "vLLM is not installed"
    assert found.origin is not None
    return Path(found.origin).parent.parent


def fetch(version: str, folder: Path) -> Path:
    """vLLM's Python files of that version, unpacked from its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    subprocess.run([*command, *platforms, "--python-version", "3.12", "-d", str(folder), f"vllm=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "tree", [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    return folder / "tree"


def tried(root: Path) -> list[str]:
    """The last line of the tests if they fail with the vLLM under ``root``."""
    repository = FOLDER.parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(repository)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    return (
        []
        if done.returncode == 0
        else [line for line in done.stdout.splitlines() if line.startswith("FAILED")] or ["no tests ran"]
    )


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("versions", nargs="*", help="default: the installed one")
    arguments.add_argument("--write", action="store_true", help="take the snapshots anew")
    arguments.add_argument("--tree", type=Path, help="an unpacked wheel of the one version given")
    given = arguments.parse_args()
    failed = False
    for version in given.versions or [hooks.vllm_version()]:
        with tempfile.TemporaryDirectory() as folder:
            root = given.tree or (fetch(version, Path(folder)) if given.versions else installed())
            now = take(root)
            problems = tried(root) if given.versions and not given.tree else []
        if given.write:
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(said)}" for name, said in now.items())
            path(version).write_text(f"{{\n{lines}\n}}\n")
        kept = read(version) if path(version).exists() else {}
        problems += broken(now) + differences(kept, now)
        failed = failed or bool(problems)
        print(f"vLLM {version}: {len(now)} symbols, {len(problems)} problems", *problems, sep="\n  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
