"""Salted Gumbel noise inside a kernel; the specification and the source are ``heads/noise.py``.

    h = murmur3_32(seed xor slot * 2^32, position + 2^30, token);  u = (h + 1/2) / 2^32;  g = -log(-log(1 - u))

The float operations and their order are those of vLLM's float32 sampler, so that g has its very bits: log(1 - u) is
an eighth-degree series below 1/4, where the winning tail is, and a plain logarithm above.
"""

import triton
import triton.language as tl

_SALT = tl.constexpr(1 << 30)


@triton.jit
def _mix(h, word):
    word *= 0xCC9E2D51
    word = (word << 15) | (word >> 17)
    word *= 0x1B873593
    h ^= word
    h = (h << 13) | (h >> 19)
    return h * 5 + 0xE6546B64


@triton.jit
def _log_one_minus(u):
    p = 1.0 / 7.0 + u * (1.0 / 8.0)
    p = 1.0 / 6.0 + u * p
    p = 1.0 / 5.0 + u * p
    p = 1.0 / 4.0 + u * p
    p = 1.0 / 3.0 + u * p
    p = 1.0 / 2.0 + u * p
    p = 1.0 + u * p
    return tl.where(u < 0.25, -u * p, tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08)))


@triton.jit
def hash_prefix(seeds, positions, slot):
    """The part of the salted hash that all tokens of a draw share: uint32, the shape of int64 ``seeds``; ``slot`` is int32."""
    positions += _SALT
    seeds ^= slot.to(tl.int64) << 32
    h = (seeds ^ seeds).to(tl.uint32)
    h = _mix(h, (seeds & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, ((seeds >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(h, (positions & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def uniform(prefix, tokens):
    """u in (0, 1], float32; ``prefix`` and ``tokens`` broadcast."""
    h = _mix(prefix, tokens.to(tl.uint32)) ^ 16
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    high = (h >> 16).to(tl.int32).to(tl.float32)
    low = (h & 0xFFFF).to(tl.int32).to(tl.float32)
    return high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(prefix, tokens):
    """g, float32; ``prefix`` from :func:`hash_prefix`."""
    return -tl.log(-_log_one_minus(uniform(prefix, tokens)))
