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
# Such blocks by which the heap is grown in advance: what it grows by later is a mapping of its own that nobody has advised on.
_SPARE = 4

Range = tuple[int, int]  # first address, and the one after the last


def settle(caches: Iterable[Tensor]) -> None:
    """Both: keep the heap, and have it and these tensors on huge pages. Again, it does the same for what came since."""
    keep_heap()
    prefer_huge_pages(caches)


def keep_heap() -> bool:
    """Have glibc keep what is freed, and some room; False where another allocator or the environment decides that."""
    decided = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    library = _glibc()
    if decided or library is None:
        return False
    if not (library.mallopt(_M_TRIM_THRESHOLD, _KEPT) and library.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)):
        return False
    library.malloc.restype = ctypes.c_void_p
    for block in [library.malloc(ctypes.c_size_t(_FROM_HEAP - mmap.PAGESIZE)) for _ in range(_SPARE)]:
        library.free(ctypes.c_void_p(block))
    return True


def prefer_huge_pages(caches: Iterable[Tensor] = ()) -> int:
    """Ask Linux to back these tensors, the heap, and large mappings that are in use, with transparent huge pages.

    At once from Linux 6.1 on, which copies what is there; by and by before. What it holds stays.

    Returns:
        Bytes asked for, 0 where this cannot be had; one line in the log says which.
    """
    problem, total = obstacle(), 0
    if problem is None:
        ranges = list(_in_use())
        ranges += [(low, high) for low, high in _storages(caches) if not any(a <= low and high <= b for a, b in ranges)]
        refused = {one: _advise(*one) for one in ranges}  # a mapping may have gone since it was listed
        total = sum(high - low for (low, high), why in refused.items() if why is None)
        problem = next(filter(None, refused.values()), None) if total == 0 else None
    if problem:
        logger.info("no huge pages: %s", problem)
    else:
        logger.info("huge pages: asked for %d MiB", total >> 20)
    return total


def obstacle() -> str | None:
    """Why there are no transparent huge pages here, or None."""
    try:
        chosen = ENABLED.read_text()
    except OSError:
        return "this system has none"
    return f"{ENABLED} says never" if "[never]" in chosen else None


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and its allocator the one in use, which a preloaded one would replace."""
    try:
        used, own = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
        address = [ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (used, own)]
    except (OSError, AttributeError):
        return None
    return used if hasattr(used, "mallopt") and address[0] == address[1] else None


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

    So weights are usually among them; stacks and what is only reserved are not. None is smaller than a huge page.
    """
    try:
        lines = MAPPINGS.read_text(errors="replace").split("\n")
    except OSError:
        return
    here: Range = (0, 0)
    wanted: int | None = None  # bytes of it that must be in memory; None: it is not one of ours
    for first, *rest in filter(None, map(str.split, lines)):
        if not first.endswith(":"):  # address, permissions, offset, device, inode, name
            start, end = (int(address, 16) for address in first.split("-"))
            here, name = (start, end), " ".join(rest[4:])
            ours = rest[0] == "rw-p" and rest[3] == "0" and end - start >= _HUGE
            wanted = {"[heap]": 0, "": (end - start) // 2}.get(name) if ours else None
        elif first == "Rss:" and wanted is not None and int(rest[0]) << 10 >= wanted:
            yield here


def _advise(start: int, end: int) -> str | None:
    """``madvise`` for whole pages; what went wrong, or None."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE) != 0:
        return f"madvise failed with {errno.errorcode.get(ctypes.get_errno(), ctypes.get_errno())}"
    # One by one, for a hole would end it. Where this cannot be done now, the kernel's own thread does it.
    for page in range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
        madvise(ctypes.c_void_p(page), ctypes.c_size_t(_HUGE), _COLLAPSE)
    return None
