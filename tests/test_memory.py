"""A worker's memory: kept, asked to be on huge pages where Linux has them, and said where it does not."""

import logging
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_dspark.engine import memory

SIZE = 8 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux" or memory.obstacle() is not None, reason=str(memory.obstacle()))

SMAPS = """\
{a:x}-{b:x} rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                2048 kB
VmFlags: rd wr mr mw me ac
{b:x}-{c:x} rw-p 00000000 00:00 0                          [heap]
Size:               4096 kB
Rss:                   8 kB
{c:x}-{d:x} rw-p 00000000 00:00 0
Size:               8192 kB
Rss:                 100 kB
{d:x}-{e:x} rw-p 00000000 fe:00 1234                       /usr/lib/library.so
Size:               4096 kB
Rss:                4096 kB
{e:x}-{f:x} r--p 00000000 00:00 0
Size:               4096 kB
Rss:                4096 kB
{f:x}-{g:x} rw-p 00000000 00:00 0                          [stack]
Size:               4096 kB
Rss:                4096 kB
{g:x}-{h:x} rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                1024 kB
""".format(**{name: (1 << 30) + (place << 22) for place, name in enumerate("abcdefgh")})

# In a process of its own: what is advised on, and how the heap is kept, stays so.
KEPT = """
import resource, torch
from vllm_dspark.engine import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        one, other = torch.ones(1 << 18), torch.ones(1 << 19)  # 1 and 2 MiB
        del one, other
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def size():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

before = size()
print(memory.keep_heap(), size() - before)
faults()
print(faults())
"""


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
    mine = fresh().fill_(7)
    assert memory.prefer_huge_pages() >= SIZE
    assert advised(mine.data_ptr() + SIZE // 2)
    assert mine.unique().tolist() == [7]


def test_in_use_is_the_heap_and_memory_that_is_mostly_there(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MAPPINGS", tmp_path / "smaps")
    memory.MAPPINGS.write_text(SMAPS)
    start = 1 << 30
    assert list(memory._in_use()) == [(start, start + (4 << 20)), (start + (4 << 20), start + (8 << 20))]


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


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_a_step_finds_the_memory_that_the_last_one_freed():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    kept, grown, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("the environment decides what the C library keeps")
    assert int(faults) < 20, "3 MiB, twenty times over"
    assert int(grown) < 1024, "kB: room in the heap takes no memory before it is used"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_the_heap_stands(monkeypatch, name):
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1")
    assert not memory.keep_heap()
