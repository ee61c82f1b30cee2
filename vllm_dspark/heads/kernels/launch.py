"""Launch shapes by batch, vocabulary, rank, weight bytes and device: a committed table, then a rule. Nothing is tuned live.

The rule. One row (or two) is a streamed product without tensor cores: small tiles straight into registers, four programs
a multiprocessor, so that about 64 KB a multiprocessor is in flight, which is what it takes to saturate its share of the
memory. More rows, and greedy ones beside eight-bit weights, go through tensor cores in row blocks of 16 to 128; tiles pass
through shared memory in as many stages as fit. (A streamed product takes about 340 instructions for 32 eight-bit rows of W2,
most of them to widen the weights: longer than memory takes to bring them. Drawing noise for 16 rows where one or two are real
takes longer still.) The vocabulary is cut into as many parts as programs run at once, of equal size to within ``ALIGN`` ids,
so that all finish together; the row blocks that share a part are neighbours.
"""

from dataclasses import dataclass

import torch

from vllm_dspark.heads.modules import HeadKind

ALIGN = 16  # ids: parts start on 32-byte boundaries of 16-bit logits
MAX_RANK = 512
MAX_PARTS = 1024


@dataclass(frozen=True)
class Device:
    """arch: "sm_90", "gfx942", … or "interpreter"; processors: multiprocessors; shared: bytes a program may use; overlaps: a
    launch may start while the one before it ends (``common.follow``)."""

    arch: str
    processors: int
    shared: int
    overlaps: bool = False

    def follow(self, ours: bool) -> dict[str, bool]:
        """Options of launches that call ``common.follow``; ``ours``: the launch before this one does, too."""
        return {"OVERLAP": True, "launch_pdl": ours} if self.overlaps else {"OVERLAP": False}


@dataclass(frozen=True)
class StepLaunch:
    """Of ``step.py``: rows and ids of a tile, parts of the vocabulary and their ids, warps, pipeline stages, programs that a
    multiprocessor is counted on to run at once, and whether the reduction of the last step's maxima is fused in."""

    block_rows: int
    block_vocab: int
    parts: int
    chunk: int
    warps: int
    stages: int
    resident: int
    fused: bool


@dataclass(frozen=True)
class Tile:
    """Ids of a tile, warps, stages, programs a multiprocessor."""

    block_vocab: int
    warps: int
    stages: int
    resident: int


# (arch, rows of a block, bytes a weight, split, sampled) at padded rank 256: exceptions to the rule. Those of sm_90 were faster
# on an H200 at 8 and 64 rows of Qwen3's shape; the others keep launches from spilling.
TABLE: dict[tuple[str, int, int, bool, bool], Tile] = {
    ("sm_90", 16, 2, False, False): Tile(64, 4, 4, 2),
    ("sm_90", 16, 2, False, True): Tile(64, 8, 3, 2),
    ("sm_90", 16, 1, False, True): Tile(128, 8, 2, 2),
    ("sm_90", 64, 2, False, False): Tile(64, 4, 2, 2),
    ("sm_90", 64, 2, False, True): Tile(32, 4, 3, 2),
    ("sm_90", 64, 1, False, False): Tile(128, 8, 3, 1),
    ("sm_100", 32, 1, False, False): Tile(32, 4, 3, 2),
    ("sm_100", 32, 1, False, True): Tile(32, 4, 3, 2),
    ("sm_89", 16, 1, True, False): Tile(32, 4, 2, 2),
    ("sm_89", 16, 1, True, True): Tile(32, 4, 2, 2),
}

INTERPRETER = Device("interpreter", 3, 1 << 20)
KNOWN = {
    "sm_80": Device("sm_80", 108, 163 << 10),
    "sm_89": Device("sm_89", 128, 99 << 10),
    "sm_90": Device("sm_90", 132, 227 << 10, True),
    "sm_100": Device("sm_100", 148, 227 << 10, True),
    "sm_120": Device("sm_120", 170, 99 << 10, True),
    "gfx942": Device("gfx942", 304, 64 << 10),
}


def device_of(device: torch.device) -> Device:
    """What runs there; for "cpu" the interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    name = getattr(found, "gcnArchName", "").split(":")[0]
    if torch.version.hip is not None:
        return Device(name, found.multi_processor_count, 64 << 10)
    shared = getattr(found, "shared_memory_per_block_optin", 99 << 10)
    return Device(f"sm_{found.major}{found.minor}", found.multi_processor_count, shared, _overlaps(found.major))


def _overlaps(major: int) -> bool:
    """Programmatic dependent launch: Hopper and later, a Triton that has it, and CUDA 13, whose drivers capture it."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return major >= 9 and hasattr(CUDAOptions, "launch_pdl") and int((torch.version.cuda or "0").split(".")[0]) >= 13


def unsupported(device: torch.device, rank: int, interpreting: bool) -> str | None:
    """Why the kernels cannot run there, or None."""
    if rank > MAX_RANK:
        return f"the head's rank is {rank}; the kernels go to {MAX_RANK}"
    if interpreting:
        return None
    if device.type != "cuda":
        return f"there is no Triton target for {device.type} tensors"
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if arch in ("gfx942", "gfx950") else f"{arch} is not one of gfx942, gfx950"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"sm_{major}{minor} is older than sm_80"


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def ceiling(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def step_launch(
    device: Device, batch: int, vocab: int, rank: int, weight_bytes: int, kind: HeadKind, sampled: bool
) -> StepLaunch:
    """The launch of one step for ``batch`` rows; ``weight_bytes`` is 0 where there is no W2."""
    split = kind in ("gated", "rnn")
    streamed = batch <= 2 and (weight_bytes != 1 or sampled)
    block_rows = 1 if streamed else min(power_of_two(batch, 16), _most_rows(device, split))
    if device.arch == "interpreter":
        block_rows = min(block_rows, 16)
    row_bytes = power_of_two(rank, 32) * max(weight_bytes, 1)
    found = TABLE.get((device.arch, block_rows, weight_bytes, split, sampled)) if power_of_two(rank) == 256 else None
    tile = found or (_streamed(row_bytes) if block_rows == 1 else _tiled(device, block_rows, row_bytes, rank, split))
    if device.arch == "interpreter":
        tile = Tile(32 if vocab < 512 else 256, 4, 1, 1)
    row_blocks = ceiling(batch, block_rows)
    wanted = min(max(1, device.processors * tile.resident // row_blocks), MAX_PARTS)
    chunk = ceiling(vocab, wanted * ALIGN) * ALIGN
    parts = ceiling(vocab, chunk)
    # Fused, every program reduces all parts of its rows: worth a launch while those are few beside its share of W2.
    fused = kind in ("vanilla", "none") and batch <= 16
    return StepLaunch(block_rows, tile.block_vocab, parts, chunk, tile.warps, tile.stages, tile.resident, fused)


def _streamed(row_bytes: int) -> Tile:
    """32 rows or 16 KB, whichever is less: two such tiles are in registers, one arriving and one at work."""
    return Tile(min(max(16, (16 << 10) // row_bytes), 32), 4, 1, 4)


def _most_rows(device: Device, split: bool) -> int:
    """Rows of the largest block that compiles without spilling. A split product keeps every code twice."""
    large = device.shared >= (200 << 10)
    if split:
        return 64 if large else 32 if device.shared >= (100 << 10) or device.arch.startswith("gfx") else 16
    return 128 if large and not device.arch.startswith("sm_10") else 64


def _tiled(device: Device, block_rows: int, row_bytes: int, rank: int, split: bool) -> Tile:
    """Tensor-core tiles: as many stages as fit beside the code block, down to two."""
    code = block_rows * power_of_two(rank, 32) * (4 if split else 2)
    warps = 8 if block_rows >= 64 else 4
    for block_vocab in (32, 16) if split else (64, 32, 16):
        for stages in (3, 2):
            need = code + stages * block_vocab * row_bytes + block_rows * block_vocab * 4
            if need <= device.shared:
                most = 4 if row_bytes < 512 and block_rows == 16 else 2 if warps == 4 else 1
                return Tile(block_vocab, warps, stages, max(1, min(most, device.shared // need)))
    return Tile(16, 4, 1, 1)
