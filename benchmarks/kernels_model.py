"""Bytes, flops, launches and the times they predict for one round of the sequential stage, arm by arm."""

from dataclasses import dataclass

from vllm_dspark.heads.modules import HeadKind
from vllm_dspark.kinds import WeightFormat

SLOTS = 7


@dataclass(frozen=True)
class Shape:
    vocab: int
    rank: int
    hidden: int


SHAPES = {"qwen3": Shape(151936, 256, 4096), "gemma4": Shape(262144, 256, 3840), "tiny": Shape(320, 32, 64)}


@dataclass(frozen=True)
class Machine:
    """Peak rates: bytes/s from memory and from the second-level cache, bf16 flop/s, operations/s of the other units, bytes of
    the cache; and what is reached: a share of the rates, microseconds from one graph node to the next, and for one read that
    waits for the one before it."""

    name: str
    memory: float
    cache_rate: float
    flops: float
    operations: float
    cache: float
    reached: float
    node_us: float
    trip_us: float


H200 = Machine("H200", 4.8e12, 5.5e12, 989e12, 29.6e12, 50e6, 0.9, 1.5, 0.7)
NOISE = 100  # instructions a logit that is drawn with noise, as compiled for sm_90: hash, series, two logarithms, the maximum


@dataclass(frozen=True)
class Arm:
    """A way to run the stage: which implementation, head, W2 format and number of candidates (0: the whole vocabulary)."""

    name: str
    implementation: str
    kind: HeadKind = "vanilla"
    format: WeightFormat = "native"
    top: int = 0


@dataclass(frozen=True)
class Phase:
    """What runs together, once a round: bytes moved, how many of them the cache still holds, flops, logits drawn with noise."""

    bytes: int
    kept: int = 0
    flops: int = 0
    drawn: int = 0

    def least_us(self, machine: Machine) -> float:
        moved = (self.bytes - self.kept) / machine.memory + self.kept / machine.cache_rate
        return 1e6 * max(moved, self.flops / machine.flops, NOISE * self.drawn / machine.operations)


@dataclass(frozen=True)
class Cost:
    """Of a round: phases that follow each other, kernel launches, and reads that wait for each other beyond those."""

    phases: tuple[Phase, ...]
    launches: int
    trips: int = 0

    @property
    def bytes(self) -> int:
        return sum(phase.bytes for phase in self.phases)

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.phases)

    def floor_us(self, machine: Machine = H200) -> float:
        """The least time: the phases at the machine's peak rates."""
        return sum(phase.least_us(machine) for phase in self.phases)

    def predicted_us(self, machine: Machine = H200) -> float:
        return self.floor_us(machine) / machine.reached + self.launches * machine.node_us + self.trips * machine.trip_us


def cost(arm: Arm, shape: Shape, batch: int, sampled: bool, machine: Machine = H200) -> Cost:
    """Each operand is read or written once a step by each kernel that touches it.

    W2 that fits four fifths of the second-level cache is counted as staying there after the first step.
    """
    row = 2 * batch * shape.vocab  # one bf16 pass over the batch's logits
    if arm.top:
        # The candidates are chosen in two launches; a step reads maxima, a row of W1, rows of W2 by ids. Besides: the last
        # maxima, clearing, wiping.
        gathered = batch * arm.top * (2 * shape.rank + 2)
        steps = Phase(SLOTS * gathered, 0, 2 * SLOTS * batch * arm.top * shape.rank, SLOTS * batch * arm.top * sampled)
        return Cost((Phase(SLOTS * row), steps), SLOTS + 4 + sampled, 3 * SLOTS)
    weight = shape.vocab * shape.rank * (2 if arm.format == "native" else 1)
    kept = weight * (SLOTS - 1) if weight <= machine.cache * 0.8 else 0
    flops = 2 * SLOTS * batch * shape.vocab * shape.rank
    drawn = SLOTS * batch * shape.vocab * sampled
    if arm.implementation == "fused":
        two = arm.kind != "vanilla" or batch > 16
        parts, columns = {"gated": (1, 1), "rnn": (3, 2)}.get(arm.kind, (0, 0))
        gates = 2 * parts * shape.rank * (shape.hidden + SLOTS * columns * shape.rank)
        launches = SLOTS * (2 if two else 1) + 2 + bool(parts)  # and: the last maxima, clearing, projections
        return Cost((Phase(gates + SLOTS * (weight + row * (1 + sampled)), kept, flops, drawn),), launches)
    # Bias written; read with the base logits and the sum written; that read to sample and, sampled, kept.
    compiled = arm.implementation == "compiled sequence"
    add = Phase(SLOTS * row * 3)
    sample = Phase(SLOTS * row * (1 + sampled), 0, 0, drawn)
    if compiled and not sampled:
        add, sample = Phase(SLOTS * row * 2), Phase(0)  # the sum is taken where its maximum is
    # Gather, product, sum, maximum, copy; sampled: two copies of indices, the sampler's kernel, maximum, gather.
    launches = (6 if sampled else 4) if compiled else (9 if sampled else 5)
    return Cost((Phase(SLOTS * (weight + row), kept, flops), add, sample), SLOTS * launches)
