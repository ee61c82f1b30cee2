"""The K/V cache's pages: asked for where Linux has them, and said where it does not."""

import logging
import mmap
import sys
from pathlib import Path

import pytest
import torch

from vllm_dspark.engine import memory

SIZE = 8 << 20


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


def fresh():
    """Zeroed memory that nobody has advised on: torch's may be what an earlier cache has left."""
    return torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.int8)


def can_collapse():
    """Whether this kernel makes huge pages at once, and has any left."""
    with mmap.mmap(-1, SIZE) as other:
        other.write(bytes(SIZE))
        try:
            other.madvise(memory._COLLAPSE)
        except OSError:
            return False
    return True


def advised(start):
    return "hg" in mapping(start, "VmFlags")


@pytest.mark.skipif(sys.platform != "linux" or memory.obstacle() is not None, reason=str(memory.obstacle()))
def test_asks_once_for_what_layers_share(caplog):
    whole = fresh().fill_(7)
    middle = whole.data_ptr() + SIZE // 2
    assert not advised(middle)
    with caplog.at_level(logging.INFO, "vllm.dspark"):
        assert memory.prefer_huge_pages([whole[: SIZE // 2], whole[SIZE // 2 :]]) == SIZE
    assert advised(middle)
    if can_collapse():
        assert int(mapping(middle, "AnonHugePages")[0]) >= 4 << 10  # kB: whole ones only
    assert whole.unique().tolist() == [7]
    assert caplog.messages == ["huge pages for the K/V cache: 8 MiB"]


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


def test_a_refusal_is_said(monkeypatch, caplog):
    monkeypatch.setattr(memory, "obstacle", lambda: None)
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 12345, raising=False)  # no such advice
    with caplog.at_level(logging.INFO, "vllm.dspark"):
        assert memory.prefer_huge_pages([torch.zeros(SIZE, dtype=torch.int8)]) == 0
    assert "EINVAL" in caplog.text


def test_a_tensor_smaller_than_a_page_is_left_alone():
    assert memory._advise(mmap.PAGESIZE + 1, 100) is None
