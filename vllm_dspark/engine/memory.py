"""Huge pages for the paged K/V cache of a CPU.

A cache block is small in every layer, and the blocks of a request lie wherever one was free: on pages of 4 KiB most reads
of a decoding step begin with a page walk. It shows the more the longer a server has run and the more layers share the cache,
so the drafter's layers would cost something even when nothing is drafted.
"""

import ctypes
import errno
import logging
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

logger = logging.getLogger("vllm.dspark")

_COLLAPSE = 25  # MADV_COLLAPSE, which the mmap module does not name
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""What the kernel does with our wish, the choice in brackets: always, madvise or never."""


def prefer_huge_pages(caches: Iterable[Tensor]) -> int:
    """Ask Linux to back these tensors' memory with transparent huge pages: at once from Linux 6.1 on, by and by before.

    They have been zeroed by now, on small pages, so at once means that all of it is copied; what it holds stays.

    Returns:
        Bytes asked for, 0 where this cannot be had; one line in the log says which.
    """
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
    problem = obstacle() or next(filter(None, (_advise(start, size) for start, size in storages.items())), None)
    if problem is not None:
        logger.info("no huge pages for the K/V cache: %s", problem)
        return 0
    total = sum(storages.values())
    logger.info("huge pages for the K/V cache: %d MiB", total >> 20)
    return total


def obstacle() -> str | None:
    """Why there are no transparent huge pages here, or None."""
    try:
        chosen = ENABLED.read_text()
    except OSError:
        return "this system has none"
    return f"{ENABLED} says never" if "[never]" in chosen else None


def _advise(start: int, size: int) -> str | None:
    """``madvise`` for the whole pages among ``size`` bytes; what went wrong, or None."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length <= 0:
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    if madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE) != 0:
        return f"madvise failed with {errno.errorcode.get(ctypes.get_errno(), ctypes.get_errno())}"
    madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _COLLAPSE)  # where it cannot, the kernel's own thread does it
    return None
