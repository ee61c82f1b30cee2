"""Registers, spills and shared memory of the kernels, compiled for GPUs that need not be there.

``python -m vllm_dspark.heads.kernels.resources [TARGET ...]`` compiles every launch of :data:`CASES` with the very arguments
that the launchers pass (tensors without storage) and prints a table. A spill, more shared memory than the device has, or
fewer programs at once than the launch counts on, exits 1.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.formats import Stored
from vllm_dspark.heads.kernels import advance, candidates, linear, step, top
from vllm_dspark.heads.kernels.buffers import Arguments, allocate
from vllm_dspark.heads.kernels.launch import KNOWN, Device, step_launch
from vllm_dspark.heads.modules import HeadKind
from vllm_dspark.heads.stage import Draws, Round
from vllm_dspark.heads.weights import HeadWeights
from vllm_dspark.kinds import WeightFormat

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HIDDEN = 4096
META = torch.device("meta")
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A launch to compile: Qwen3's shapes unless it says otherwise."""

    kernel: str  # step, advance, pool, choose, candidates, linear (projection or LM head)
    batch: int
    kind: HeadKind = "vanilla"
    format: WeightFormat = "native"
    sampled: bool = False
    vocab: int = 151936
    rank: int = 256
    dtype: torch.dtype = torch.bfloat16
    quick: bool = True  # one of those every test run compiles

    @property
    def label(self) -> str:
        form = str(self.dtype).removeprefix("torch.") if self.format == "native" else self.format
        how = "sampled" if self.sampled else "greedy"
        return f"{self.kernel} {self.kind} {form} {how} B={self.batch} V={self.vocab}"


CASES = (
    Case("step", 1, quick=False),
    Case("step", 1, sampled=True),
    Case("step", 1, format="int8"),
    Case("step", 1, format="fp8", sampled=True),
    Case("step", 1, format="int8", sampled=True, quick=False),
    Case("step", 8, sampled=True),
    Case("step", 64, sampled=True, quick=False),
    Case("step", 64, quick=False),
    Case("step", 64, format="int8", quick=False),
    Case("step", 64, format="int8", sampled=True, quick=False),
    Case("step", 64, format="fp8", quick=False),
    Case("step", 8, format="int8", sampled=True, quick=False),
    Case("step", 8, format="fp8", sampled=True, quick=False),
    Case("step", 256, sampled=True),
    Case("step", 8, "rnn", "int8", True, quick=False),
    Case("advance", 1, "rnn", quick=False),
    Case("advance", 64, "rnn"),
    Case("advance", 64, "gated", quick=False),
    Case("pool", 1),
    Case("choose", 1),
    Case("candidates", 1, quick=False),
    Case("candidates", 64, "gated", "int8", True),
    Case("linear", 1, "rnn", quick=False),
    Case("linear", 64, "none", "fp8"),
    Case("linear", 1, "none", "fp8", quick=False),
    Case("linear", 64, "gated", quick=False),
    Case("step", 16, quick=False),
    Case("step", 32, sampled=True, quick=False),
    Case("step", 32, format="int8", quick=False),
    Case("step", 256, format="int8", sampled=True, quick=False),
    Case("step", 256, "gated", "fp8", True, quick=False),
    Case("step", 64, "gated", sampled=True, quick=False),
    Case("step", 1, "rnn", sampled=True, quick=False),
    Case("step", 1, vocab=262144, sampled=True, quick=False),
    Case("step", 64, vocab=262144, sampled=True, quick=False),
    Case("step", 1, "none", sampled=True, quick=False),
    Case("step", 64, "none", sampled=True, quick=False),
    Case("step", 1, dtype=torch.float16, sampled=True, quick=False),
    Case("step", 8, dtype=torch.float32, sampled=True, quick=False),
    Case("advance", 1, "vanilla", quick=False),
    Case("advance", 64, "vanilla", quick=False),
)


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers a thread, bytes spilled a thread, bytes of shared memory a program, warps."""

    target: str
    label: str
    registers: int
    spilled: int
    shared: int
    warps: int
    limit: int  # shared memory a program may have
    counted_on: int  # programs at once on a multiprocessor, as the launch expects

    @property
    def resident(self) -> int:
        """Programs that registers and shared memory let run at once on an NVIDIA multiprocessor."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, (self.limit + 1024) // (self.shared + 1024))

    @property
    def fits(self) -> bool:
        enough = self.target.startswith("gfx") or self.resident >= self.counted_on
        return self.spilled == 0 and self.shared <= self.limit and enough


def e4m3(device: Device) -> torch.dtype:
    """As ``formats.store`` keeps it there."""
    return torch.uint8 if device.arch in ("sm_80", "gfx942") else torch.float8_e4m3fn


def weights_of(case: Case, fp8: torch.dtype) -> HeadWeights:
    """Tensors without storage in the shapes of ``case``."""

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    r, v = case.rank, case.vocab
    stored = {"native": case.dtype, "int8": torch.int8, "fp8": fp8}[case.format]
    w2 = Stored(meta(v, r, dtype=stored), None if case.format == "native" else meta(v, dtype=torch.float32), case.format)
    parts = {"gated": 1, "rnn": 3}.get(case.kind, 0)
    bare = case.kind == "none"
    return HeadWeights(
        case.kind, 0 if bare else r, case.dtype, None if bare else meta(v, r), None if bare else w2,
        meta(parts * r, r * (2 if parts == 3 else 1)) if parts else None,
        meta(parts * r, HIDDEN) if parts else None, meta(parts * r) if parts else None,
        (meta(HIDDEN, dtype=torch.float32), meta(1, dtype=torch.float32)), meta(v, dtype=torch.float32), None, 0.0, 1.0,
    )  # fmt: skip


def launch_of(case: Case, device: Device, slots: int = 7) -> tuple[Any, Arguments, int]:
    """The kernel, the arguments of step 1 of a round and the programs counted on at once."""
    weights = weights_of(case, e4m3(device))
    buffers = allocate(weights, case.batch, slots, META)

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    b = case.batch
    draws = Draws(
        meta(b, dtype=torch.float32), meta(b, dtype=torch.int64), meta(b, slots, dtype=torch.int64), None,
        meta(b, slots, case.vocab, dtype=case.dtype),
    ) if case.sampled else None  # fmt: skip
    round = Round(
        None, meta(b, slots, case.vocab, dtype=case.dtype), meta(b, dtype=torch.int64), meta(b, slots, dtype=torch.int64),
        meta(b, slots, dtype=torch.float32), meta(b, dtype=torch.int64), draws,
    )  # fmt: skip
    if case.kernel == "linear":
        x = meta(b * slots, HIDDEN, dtype=case.dtype)
        head = Stored(meta(case.vocab, HIDDEN, dtype=e4m3(device)), meta(case.vocab, dtype=torch.float32), "fp8")
        matrix = head if weights.outer is None else Stored(weights.outer, None, "native")
        out = meta(b * slots, len(matrix.values), dtype=case.dtype if weights.outer is None else torch.float32)
        unit = None
        if weights.outer is None and case.dtype == torch.bfloat16:
            x, unit = meta(b * slots, HIDDEN, dtype=torch.float16), meta(b * slots, dtype=torch.float32)
        return linear.linear_kernel, linear.arguments(x, matrix, out, weights.outer_bias, unit=unit), 1
    if case.kernel in ("pool", "choose"):
        scratch, chosen = meta(1, dtype=torch.int64), meta(b, slots, 256, dtype=torch.int32)
        launches = top.arguments(round.logits, round.index, 256, scratch, chosen, 0, device)
        return (top.pool_kernel, launches[0], 1) if case.kernel == "pool" else (top.choose_kernel, launches[1], 1)
    if case.kernel == "candidates":
        chosen = meta(b, slots, 256, dtype=torch.int32)
        some = Candidates(256, meta(case.vocab, 64, dtype=torch.int32))
        written = meta(b, slots, some.most, dtype=torch.int32) if case.sampled else None
        listed = candidates.arguments(weights, buffers, round, 1, some, chosen, written, device)
        return candidates.candidate_kernel, listed, 1
    size = 0 if weights.w2 is None else weights.w2.values.element_size()
    launch = step_launch(device, b, case.vocab, weights.rank, size, case.kind, case.sampled)
    if case.kernel == "advance":
        return advance.advance_kernel, advance.arguments(weights, buffers, round, 1, launch.parts, device), 1
    return step.step_kernel, step.arguments(weights, buffers, round, 1, launch, device), launch.resident


def compile_for(target: GPUTarget, kernel: Any, arguments: Arguments) -> Any:
    """Compile one launch as Triton's launcher would specialise it."""
    _, values, options = arguments
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    free = {kernel.arg_names[i] for i in kernel.do_not_specialize if isinstance(i, int)} | set(kernel.do_not_specialize)
    named = dict(zip(kernel.arg_names, values, strict=False)) | {n: v for n, v in options.items() if n in kernel.arg_names}
    for place, name in enumerate(kernel.arg_names):
        value = named[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in free:
            signature[name] = "i32"
        elif value is None or name in options or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    chosen = {name: value for name, value in options.items() if name.startswith(("num_", "launch_"))}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=chosen)


def measure(target: str, case: Case) -> Resources:
    """Compile ``case`` for ``target`` and read what it takes."""
    device = KNOWN[target]
    kernel, arguments, counted_on = launch_of(case, device)
    compiled = compile_for(TARGETS[target], kernel, arguments)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    registers, spilled = _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled.asm["cubin"])
    return Resources(target, case.label, registers, spilled, shared, warps, device.shared, counted_on)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(tool: str, *options: str) -> str:
            return subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout

        usage = read("cuobjdump", "--dump-resource-usage")
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        frame = found["STACK"] + found["LOCAL"]
        # A frame that no instruction stores to or loads from is no spill.
        if frame and not re.search(r"\b(STL|LDL)\b", read("nvdisasm")):
            frame = 0
    return found["REG"], frame


def _amd(assembly: str) -> tuple[int, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found is not None, f"no .{name} in the assembly"
        return int(found[1])

    return value("vgpr_count"), 4 * value("vgpr_spill_count") + value("private_segment_fixed_size")


def measure_all(targets: list[str], quick: bool) -> Iterator[Resources]:
    """Every case, or the quick ones, for every target."""
    for target in targets:
        for case in CASES:
            if case.quick or not quick:
                yield measure(target, case)


def main() -> None:
    quick = "--quick" in sys.argv
    targets = [name for name in sys.argv[1:] if not name.startswith("-")] or list(TARGETS)
    print(f"{'target':8} {'kernel':48} {'regs':>5} {'spill':>6} {'shared':>7} {'limit':>7} {'warps':>5} {'resident':>9}")
    failed = False
    for r in measure_all(targets, quick):
        mark = "" if r.fits else "  <-- does not fit"
        failed = failed or not r.fits
        resident = f"{r.counted_on}/{'?' if r.target.startswith('gfx') else r.resident}"
        numbers = f"{r.registers:5} {r.spilled:6} {r.shared:7} {r.limit:7} {r.warps:5} {resident:>9}"
        print(f"{r.target:8} {r.label:48} {numbers}{mark}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
