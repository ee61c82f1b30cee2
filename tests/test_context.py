"""Context K/V written late: in order, once, and complete before anything is drafted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dspark.engine.context import NO_SLOT, DeferredContext


class Cache:
    """A cache of slots, written like the kernels do it: in an order nobody may rely on."""

    def __init__(self, slots: int = 64) -> None:
        self.values = torch.full((slots,), -1.0)
        self.writes: list[int] = []

    def write(self, states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        assert all(torch.equal(column, positions.float()) for column in states.unbind(1))
        used = slots != NO_SLOT
        assert len(set(slots[used].tolist())) == int(used.sum()), "two tokens for a slot"
        self.values[slots[used]] = states[used, 0]
        self.writes.append(len(slots))


def step(numbers: list[int], slots: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.tensor(numbers, dtype=torch.int64)
    return positions.float().unsqueeze(1).repeat(1, 3), positions, torch.tensor(slots, dtype=torch.int64)


def test_nothing_is_written_before_it_is_asked_for():
    cache = Cache()
    context = DeferredContext(cache.write, limit=8)
    context.add(*step([1, 2], [10, 11]))
    context.add(*step([3], [12]))
    assert cache.writes == []
    assert context.tokens == 3
    context.write()
    assert cache.values[10:13].tolist() == [1, 2, 3]
    assert cache.writes == [3]
    context.write()
    assert cache.writes == [3]


def test_views_may_change_after_they_were_added():
    """The runner reuses its buffers for positions and slots in the next step."""
    cache = Cache()
    context = DeferredContext(cache.write, limit=8)
    states, positions, slots = step([5], [7])
    context.add(states, positions, slots)
    positions.fill_(0)
    slots.fill_(0)
    context.write()
    assert cache.values[7] == 5
    assert cache.values[0] == -1


def test_states_may_come_per_layer():
    cache = Cache()
    context = DeferredContext(cache.write, limit=8)
    states, positions, slots = step([1, 2], [10, 11])
    context.add(states.split(1, dim=1), positions, slots)
    context.add(*step([3], [12]))
    context.write()
    context.add(states.split(1, dim=1), positions, slots + 5)
    context.write()
    assert cache.values[10:13].tolist() == [1, 2, 3]
    assert cache.values[15:17].tolist() == [1, 2]


def test_late_writes_come_in_few_sizes():
    """Every new size of a matrix product costs a CPU time to prepare."""
    sizes = set()
    for count in range(2, 513):
        cache = Cache(count)
        context = DeferredContext(cache.write, limit=1000)
        context.add(*step([0], [0]))
        context.add(*step(list(range(1, count)), list(range(1, count))))
        context.write()
        assert cache.values.tolist() == list(range(count))
        assert cache.writes[0] <= count * 9 / 8
        sizes.update(cache.writes)
    assert len(sizes) <= 8 * 7


def test_steps_are_split_so_that_writes_have_the_size_of_the_limit():
    cache = Cache()
    context = DeferredContext(cache.write, limit=8)
    states, positions, slots = step(list(range(20)), list(range(20)))
    context.add(states.split(1, dim=1), positions, slots)
    context.add(*step(list(range(30, 45)), list(range(30, 45))))
    states, positions, slots = step([50], [50])
    context.add(states.split(1, dim=1), positions, slots)
    assert cache.writes == [8, 8, 8, 8]
    context.write()
    assert cache.writes == [8, 8, 8, 8, 4]
    assert cache.values[:20].tolist() == list(range(20))
    assert cache.values[30:45].tolist() == list(range(30, 45))
    assert cache.values[50] == 50


def test_a_slot_given_to_another_request_holds_the_later_token():
    cache = Cache()
    context = DeferredContext(cache.write, limit=100)
    context.add(*step([1, 2, 3], [20, 21, 22]))
    context.add(*step([4, 5], [22, 20]))
    context.write()
    assert cache.values[20:23].tolist() == [5, 2, 4]


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_never_more_than_the_limit_is_kept(limit):
    cache = Cache()
    context = DeferredContext(cache.write, limit)
    for number in range(10):
        context.add(*step([number], [number]))
        assert context.tokens <= max(limit - 1, 0)
    context.add(*step(list(range(20, 30)), list(range(20, 30))))
    assert context.tokens == 0
    assert cache.values[:10].tolist() == list(range(10))
    assert cache.values[20:30].tolist() == list(range(20, 30))


def test_what_an_ended_request_left_in_a_block_is_not_written():
    cache = Cache()
    context = DeferredContext(cache.write, limit=100)
    context.add(*step([1, 2, 3, 4], [8, 9, 20, 0]))
    context.add(*step([5, 6], [10, 21]))
    context.forget([2], size=4)  # slots 8 to 11; 10 is the last step's, who knows of which request
    context.add(*step([7, 8], [9, 22]))  # another request has the block now
    context.write()
    assert cache.values[[0, 8, 9, 10, 20, 21, 22]].tolist() == [4, -1, 7, 5, 3, 6, 8]
    assert cache.writes == [6]


def test_only_the_blocks_asked_for_are_written():
    cache = Cache()
    context = DeferredContext(cache.write, limit=100)
    context.write_blocks([0, 3], size=4)
    context.add(*step([1, 2, 3, 4], [8, 9, 20, NO_SLOT]))
    context.add(*step([5, 6], [10, 20]))  # the block with slot 20 has been given to another request
    context.write_blocks([5, 14], size=4)
    assert cache.writes == [2]
    assert cache.values[20] == 6
    assert (context.tokens, context.written) == (4, 2)
    context.write_blocks([], size=4)
    context.write_blocks([5], size=4)
    assert cache.writes == [2]
    context.write()
    assert cache.values[[8, 9, 10, 20]].tolist() == [1, 2, 5, 6]
    assert (context.tokens, context.written) == (0, 6)


def test_it_is_told_when_one_write_would_do():
    context = DeferredContext(Cache().write, limit=100, together=3)
    assert context.few
    context.add(*step([1, 2, 3], [1, 2, 3]))
    assert context.few
    context.add(*step([4], [4]))
    assert not context.few


@pytest.mark.parametrize(("waiting", "limit", "together"), [(0, 100, 3), (2, 100, 3), (0, 100, 2), (0, 0, None), (5, 6, 3)])
def test_a_step_is_written_with_all_that_waits(waiting, limit, together):
    cache = Cache()
    context = DeferredContext(cache.write, limit, together)
    for token in range(waiting):
        context.add(*step([token], [token]))
    context.write_with(*step([7, 8, 9], [20, 21, 22]))
    assert cache.values[:waiting].tolist() == list(range(waiting))
    assert cache.values[20:23].tolist() == [7, 8, 9]
    assert (context.tokens, context.written) == (0, waiting + 3)
    context.add(*step([6], [21]))
    context.write()
    assert cache.values[20:23].tolist() == [7, 6, 9]


def test_nothing_is_written_where_all_is_forgotten():
    cache = Cache()
    context = DeferredContext(cache.write, limit=100)
    context.add(*step([1, 2], [4, 5]))
    context.add(*step([3], [60]))
    context.forget([], size=4)
    context.forget([1, 15], size=4)
    context.forget([15], size=4)
    context.add(*step([], []))
    context.forget([15], size=4)
    context.write()
    assert cache.writes == []
    assert context.tokens == 0
    assert (cache.values == -1).all()


def test_a_block_may_be_forgotten_again_and_again():
    cache = Cache()
    context = DeferredContext(cache.write, limit=8, together=2)
    for number in range(0, 40, 2):
        context.add(*step([number, number + 1], [12, 13]))
        context.add(*step([100 + number], [40]))
        context.forget([3], size=4)
        assert context.tokens < 8
    context.write()
    assert cache.values[40] == 138
    assert max(cache.writes) <= 2
    assert (cache.values[12:14] == -1).all()


@pytest.mark.parametrize(("limit", "together"), [(8, 8), (8, 3), (20, 6)])
def test_no_more_is_written_at_once_than_is_told(limit, together):
    cache = Cache()
    context = DeferredContext(cache.write, limit, together)
    context.add(*step(list(range(19)), list(range(19))))
    assert context.tokens < limit
    context.write()
    assert cache.values[:19].tolist() == list(range(19))
    assert max(cache.writes) <= together


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_all_is_written_but_what_ended_requests_left(limit, together, seed):
    """Requests of up to three blocks come and go; a block that one has filled may be read whenever a draft runs."""
    rng = np.random.default_rng(seed)
    cache = Cache()
    context = DeferredContext(cache.write, limit, together)
    free, requests, number, filled = list(range(16)), [], 0, {}
    for _ in range(60):
        if free and rng.random() < 0.4:
            requests.append([])  # slots and tokens
        numbers, slots = [], []
        for request in requests:
            block = request[-1][0] // 4 if request else 0
            for _ in range(int(rng.integers(1, 4))):
                if len(request) % 4 == 0 and not free:
                    break
                if len(request) % 4 == 0:
                    block = free.pop(int(rng.integers(len(free))))
                    filled.pop(block, None)
                request.append((block * 4 + len(request) % 4, number))
                slots.append(request[-1][0])
                numbers.append(number)
                number += 1
        context.add(*step(numbers, slots))
        for request in [each for each in requests if rng.random() < 0.2]:
            requests.remove(request)
            full = len(request) // 4
            for slot, token in request[: 4 * full]:
                filled.setdefault(slot // 4, {})[slot] = token
            context.forget([slot // 4 for slot, _ in request[4 * full :: 4]], size=4)
            free += {slot // 4 for slot, _ in request}
        if rng.random() < 0.3:
            drafting = [each for each in requests if each and rng.random() < 0.5]
            context.write_blocks([slot // 4 for request in drafting for slot, _ in request[::4]], size=4)
            for request in drafting:
                assert all(cache.values[slot] == token for slot, token in request)
        if rng.random() < 0.2:
            context.write()
            assert context.tokens == 0
            for request in requests:
                assert all(cache.values[slot] == token for slot, token in request)
            for block in filled.values():
                assert all(cache.values[slot] == token for slot, token in block.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_it_ends_as_if_every_step_had_been_written_at_once(limit, seed):
    rng = np.random.default_rng(seed)
    late, now = Cache(), Cache()
    context = DeferredContext(late.write, limit)
    for number in range(30):
        count = int(rng.integers(1, 6))
        states, positions, slots = step([100 * number + i for i in range(count)], rng.permutation(64)[:count].tolist())
        now.write(states, positions, slots)
        (context.write_with if rng.random() < 0.3 else context.add)(states, positions, slots)
        if rng.random() < 0.2:
            context.write()
            assert torch.equal(late.values, now.values)
    context.write()
    assert torch.equal(late.values, now.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllms_kernel_passes_over_a_slot_that_is_none(dtype):
    """In the layout that this machine's CPU has the cache in."""
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    keys = torch.arange(1.0, 129.0, dtype=dtype).view(4, 1, 32)

    def written(tokens: list[int], slots: list[int]) -> torch.Tensor:
        cache = torch.zeros(2, 1, 64, 32, dtype=dtype)
        halves = cache.chunk(2, dim=2)
        _custom_ops.cpu_attn_reshape_and_cache(
            keys[tokens], keys[tokens], *halves, torch.tensor(slots), _get_attn_isa(dtype, 32, 32)
        )
        return cache

    assert torch.equal(written([0, 1, 2, 3], [NO_SLOT, 33, NO_SLOT, 2]), written([1, 3], [33, 2]))
    assert written([1], [33]).any()
