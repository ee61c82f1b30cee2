"""A worker's memory: kept, asked to be on huge pages where Linux has them, and said where it does not."""

import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from vllm_dspark.engine import memory

SIZE = 8 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux" or memory.obstacle() is not None, reason=str(memory.obstacle()))

SMAPS = """\
40000000-40400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                2048 kB
VmFlags: rd wr mr mw me ac
40400000-40800000 rw-p 00000000 00:00 0                          [heap]
Size:               4096 kB
Rss:                   8 kB
40800000-40c00000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                 100 kB
40c00000-41000000 rw-p 00000000 fe:00 1234                       /usr/lib/library.so
Size:               4096 kB
Rss:                4096 kB
41000000-41400000 r--p 00000000 00:00 0
Size:               4096 kB
Rss:                4096 kB
41400000-41800000 rw-s 00000000 00:00 0
Size:               4096 kB
Rss:                4096 kB
41800000-41c00000 rw-p 00000000 00:00 0                          [stack]
Size:               4096 kB
Rss:                4096 kB
41c00000-41d00000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                1024 kB
"""

# In a process of its own: what is advised on, and how the heap is kept, stays so.
KEPT = """
import resource, torch
from vllm_dspark.engine import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [torch.ones(1 << 21) for _ in range(24)]  # 8 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def size():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("Rss:"))

faults()
before = faults(), size()
print(memory.keep_heap(), size() - before[1], before[0])
faults()
print(faults())
"""
IN_USE = """
import torch
from vllm_dspark.engine import memory

mine = torch.full((64 << 20,), 7, dtype=torch.int8)
print(memory.prefer_huge_pages(), mine.unique().tolist() == [7])
print(sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHugePages:")))
"""
USUAL = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MALLOC_") and name not in ("GLIBC_TUNABLES", "LD_PRELOAD")
}


def in_process(script):
    done = subprocess.run([sys.executable, "-c", script], env=USUAL, capture_output=True, text=True, check=True)
    return done.stdout.split()


def mapping(start, name):
    """What the kernel says under this name of the mapping that holds this address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            here = low <= start < high
        elif here and first == f"{name}:":
            return rest.split()
    return []


def fresh(size=SIZE):
    """Zeroed memory of this process that nobody has advised on: torch's may be what an earlier cache has left."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.int8)


def can_collapse():
    """Whether this kernel makes huge pages at once, and has any left."""
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as other:
        other.write(bytes(SIZE))
        try:
            other.madvise(memory._COLLAPSE)
        except OSError:
            return False
    return True


def advised(start):
    return "hg" in mapping(start, "VmFlags")


@pytest.fixture
def nothing_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MAPPINGS", tmp_path / "smaps")


@LINUX
def test_asks_once_for_what_layers_share(caplog, nothing_in_use):
    whole = fresh().fill_(7)
    middle = whole.data_ptr() + SIZE // 2
    assert not advised(middle)
    with caplog.at_level(logging.INFO, "vllm.dspark"):
        assert memory.prefer_huge_pages([whole[: SIZE // 2], whole[SIZE // 2 :]]) == SIZE
    assert advised(middle)
    if can_collapse():
        assert int(mapping(middle, "AnonHugePages")[0]) >= 4 << 10  # kB: whole ones only
    assert whole.unique().tolist() == [7]
    assert caplog.messages == ["huge pages: asked for 8 MiB"]


@LINUX
def test_asks_for_what_is_in_use_whoever_made_it():
    asked, unchanged, huge = in_process(IN_USE)
    assert int(asked) >= 64 << 20
    assert unchanged == "True"
    if can_collapse():
        assert int(huge) >= 32 << 10  # kB: most of it, as far as the system has huge pages left


def test_in_use_is_the_heap_and_memory_that_is_mostly_there(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MAPPINGS", tmp_path / "smaps")
    memory.MAPPINGS.write_text(SMAPS)
    assert list(memory._in_use()) == [(0x40000000, 0x40400000), (0x40400000, 0x40800000)]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "this system has none"), ("always madvise [never]\n", "says never")], ids=["absent", "never"]
)
def test_says_why_not_and_leaves_the_memory_alone(tmp_path, monkeypatch, caplog, content, said):
    monkeypatch.setattr(memory, "ENABLED", tmp_path / "enabled")
    if content is not None:
        memory.ENABLED.write_text(content)
    cache = fresh()
    with caplog.at_level(logging.INFO, "vllm.dspark"):
        assert memory.prefer_huge_pages([cache]) == 0
    assert said in caplog.text
    assert not Path("/proc/self/smaps").exists() or not advised(cache.data_ptr() + SIZE // 2)


def test_a_refusal_is_said(monkeypatch, caplog, nothing_in_use):
    monkeypatch.setattr(memory, "obstacle", lambda: None)
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 12345, raising=False)  # no such advice
    with caplog.at_level(logging.INFO, "vllm.dspark"):
        assert memory.prefer_huge_pages([torch.zeros(SIZE, dtype=torch.int8)]) == 0
    assert "EINVAL" in caplog.text


def test_a_tensor_smaller_than_a_page_is_left_alone():
    assert memory._storages([torch.zeros(mmap.PAGESIZE - 1, dtype=torch.int8)]) == set()


@LINUX
def test_one_mapping_that_has_gone_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MAPPINGS", tmp_path / "smaps")
    memory.MAPPINGS.write_text("1000-401000 rw-p 00000000 00:00 0\nRss: 4096 kB\n")  # nothing is mapped there
    cache = fresh()
    assert memory.prefer_huge_pages([cache]) == SIZE
    assert advised(cache.data_ptr() + SIZE // 2)


@pytest.mark.skipif(memory._glibc() is None, reason="another allocator")
def test_a_step_finds_the_memory_that_the_last_one_freed():
    kept, grown, before, after = in_process(KEPT)
    assert kept == "True"
    assert int(grown) < 32 << 10, "kB: room in the heap takes no memory before it is used"
    if int(before) < 100:
        pytest.skip("this system does not count faults, or its pages are large already")
    assert int(after) < int(before) / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_the_heap_stands(monkeypatch, name):
    for given in set(os.environ) - set(USUAL):
        monkeypatch.delenv(given)
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1")
    library = Mock()
    library.malloc.return_value = None
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    assert not memory.keep_heap()
    library.mallopt.assert_not_called()
    monkeypatch.delenv(name)
    assert memory.keep_heap()
    assert library.mallopt.call_count == 2


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    assert not memory.keep_heap()
