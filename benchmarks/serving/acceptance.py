"""How many drafts are accepted: the paper's lengths on Qwen3-8B, as rates per position."""

from statistics import mean

# Tokens per round, bonus included, γ = 7, T = 1, not thinking (arXiv 2607.05147, table 1).
LENGTHS: dict[str, dict[str, float]] = {
    "code": {"MBPP": 5.16, "HumanEval": 5.52, "LCB": 5.17},
    "math": {"GSM8K": 6.17, "MATH500": 5.78, "AIME25": 5.01},
    "chat": {"MT-Bench": 3.72, "Alpaca": 3.58, "Arena-Hard": 3.21},
}


def length(domain: str) -> float:
    """Mean accepted length of a domain's benchmarks, bonus included.

    Raises:
        KeyError: there is no such domain.
    """
    return mean(LENGTHS[domain].values())


def conditional(tokens: float, drafts: int) -> float:
    """Probability p of one draft given that those before it were accepted: ``1 + p + p² + … + p^drafts = tokens``.

    One p for all positions: DSpark's sequential stage is there to keep it from decaying along the block.

    Raises:
        ValueError: ``tokens`` is not within [1, 1 + drafts].
    """
    if not 1.0 <= tokens <= 1.0 + drafts:
        raise ValueError(f"{drafts} drafts yield 1 to {1 + drafts} tokens per round, not {tokens}")
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if sum(p**k for k in range(drafts + 1)) < tokens else (low, p)
    return low


def rates(domain: str, drafts: int) -> list[float]:
    """Probability that the first 1, 2, … drafts are all accepted: vLLM's ``synthetic_acceptance_rates``.

    The rates are those of a block of 7; fewer drafts are its first ones.
    """
    p = conditional(length(domain), 7)
    return [p**k for k in range(1, drafts + 1)]
