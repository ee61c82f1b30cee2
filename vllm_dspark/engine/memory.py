"""A CPU worker's memory: kept from step to step, and on huge pages.

A step allocates its activations anew. glibc gives what is large, and what is free at the end of its heap, back to the system
as soon as it can, so that the next step meets fresh pages: one fault for each 4 KiB. And what lies on pages of 4 KiB is read
with a page walk for most of it: weights, once a step, and cache blocks, of which each is small in every layer and lies wherever
one was free. A plain engine has both costs; a drafter's layers, context and states add to both.
"""

import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

logger = logging.getLogger("vllm.dspark")

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""What the kernel does with our wish, the choice in brackets: always, madvise or never."""
MAPPINGS = Path("/proc/self/smaps")

_COLLAPSE = 25  # MADV_COLLAPSE, which the mmap module does not name
_HUGE = 2 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 1 << 30  # bytes free at the end of the heap beyond which they are given back
_FROM_HEAP = 32 << 20  # bytes: the largest block that glibc lets come from the heap
_SPARE = (
    4  # such blocks by which the heap is grown in advance: what it grows by later would be a mapping that nobody advised on
)

_NEVER = 1 << 62

Range = tuple[int, int]  # first address, and the one after the last


def keep_heap() -> bool:
    """Have glibc keep what is freed, and some room; False where another C library or the environment decides that."""
    ours = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    library = ctypes.CDLL(None)
    if ours or not hasattr(library, "mallopt"):
        return False
    if not (library.mallopt(_M_TRIM_THRESHOLD, _KEPT) and library.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)):
        return False
    library.malloc.restype = ctypes.c_void_p
    for block in [library.malloc(ctypes.c_size_t(_FROM_HEAP - mmap.PAGESIZE)) for _ in range(_SPARE)]:
        library.free(ctypes.c_void_p(block))
    return True


def prefer_huge_pages(caches: Iterable[Tensor] = ()) -> int:
    """Ask Linux to back these tensors, and all memory in use, with transparent huge pages.

    At once from Linux 6.1 on, which copies what is there; by and by before. What it holds stays.

    Returns:
        Bytes asked for, 0 where this cannot be had; one line in the log says which.
    """
    problem = obstacle()
    ranges = [] if problem else list(_in_use())
    if not problem:
        ranges += [(low, high) for low, high in _storages(caches) if not any(a <= low and high <= b for a, b in ranges)]
        problem = next(filter(None, (_advise(*one) for one in ranges)), None)
    if problem:
        logger.info("no huge pages: %s", problem)
        return 0
    total = sum(high - low for low, high in ranges)
    logger.info("huge pages: asked for %d MiB", total >> 20)
    return total


def obstacle() -> str | None:
    """Why there are no transparent huge pages here, or None."""
    try:
        chosen = ENABLED.read_text()
    except OSError:
        return "this system has none"
    return f"{ENABLED} says never" if "[never]" in chosen else None


def _storages(tensors: Iterable[Tensor]) -> set[Range]:
    """The whole pages of what these tensors share."""
    found = set()
    for tensor in tensors:
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            found.add((first, last))
    return found


def _in_use() -> Iterator[Range]:
    """The heap, and mappings of this process alone that no file is behind, if at least half of them is in memory.

    So weights are among them; stacks and what is only reserved are not. None is smaller than a huge page.
    """
    try:
        lines = MAPPINGS.read_text().splitlines()
    except OSError:
        return
    here, wanted = (0, 0), 0  # and how many bytes of it must be in memory
    for line in lines:
        first, *rest = line.split()
        if not first.endswith(":"):  # address, permissions, offset, device, inode, name
            start, end = (int(address, 16) for address in first.split("-"))
            here, name = (start, end), " ".join(rest[4:])
            ours = rest[0] == "rw-p" and rest[3] == "0" and end - start >= _HUGE
            wanted = {"[heap]": 0, "": (end - start) // 2}.get(name, _NEVER) if ours else _NEVER
        elif first == "Rss:" and int(rest[0]) << 10 >= wanted:
            yield here


def _advise(start: int, end: int) -> str | None:
    """``madvise`` for whole pages; what went wrong, or None."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE) != 0:
        return f"madvise failed with {errno.errorcode.get(ctypes.get_errno(), ctypes.get_errno())}"
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _COLLAPSE)  # where it cannot, the kernel's own thread does it
    return None
