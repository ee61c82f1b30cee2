"""The specification against its own docstring: every formula worked out in float64 with plain Python and NumPy."""

import math

import numpy as np
import pytest
import torch

from vllm_dspark.heads import reference

HEADS = ("vanilla", "gated", "rnn", "none")
BATCH, SLOTS, HIDDEN, RANK, VOCAB = 3, 4, 5, 2, 13
KEPT = (2, 3, 5, 7, 11)  # the target ids of a reduced draft vocabulary


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def tensors_of(kind: str, confidence: str | None, draft_vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A random head by its checkpoint names, float64; ``confidence`` is None, "hidden" or "markov"."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    if kind != "none":
        shapes |= {"markov_head.markov_w1.weight": (VOCAB, RANK), "markov_head.markov_w2.weight": (draft_vocab, RANK)}
    if kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (RANK, HIDDEN + RANK), "markov_head.gate_proj.bias": (RANK,)}
    if kind == "rnn":
        width = 2 * RANK + HIDDEN
        shapes |= {"markov_head.joint_proj.weight": (3 * RANK, width), "markov_head.joint_proj.bias": (3 * RANK,)}
    if confidence:
        width = HIDDEN + (RANK if confidence == "markov" else 0)
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def by_hand(t, kind, hidden, logits, anchors, temperature, noise, target_ids):
    """The docstring's formulas, one sum at a time, h before e in the gate and s, e, h in the RNN."""
    tokens, q, c = [], [], []
    for row in range(len(anchors)):
        x, s = anchors[row], np.zeros(RANK)
        for k in range(SLOTS):
            h, bias = hidden[row, k], 0.0
            if kind != "none":
                e = t["markov_head.markov_w1.weight"][x]
                w2 = t["markov_head.markov_w2.weight"]
            if kind == "vanilla":
                bias = w2 @ e
            elif kind == "gated":
                weight = t["markov_head.gate_proj.weight"]
                gate = weight[:, :HIDDEN] @ h + weight[:, HIDDEN:] @ e + t["markov_head.gate_proj.bias"]
                bias = w2 @ (sigmoid(gate) * e)
            elif kind == "rnn":
                weight = t["markov_head.joint_proj.weight"]
                z = weight[:, :RANK] @ s + weight[:, RANK : 2 * RANK] @ e + weight[:, 2 * RANK :] @ h
                z = z + t["markov_head.joint_proj.bias"]
                a, candidate, output = z[:RANK], z[RANK : 2 * RANK], z[2 * RANK :]
                s = sigmoid(a) * s + (1 - sigmoid(a)) * np.tanh(candidate)
                bias = w2 @ np.tanh(output)
            if "confidence_head.proj.weight" in t:
                w = t["confidence_head.proj.weight"][0]
                logit = w[:HIDDEN] @ h + t["confidence_head.proj.bias"][0]
                c.append(sigmoid(logit + (w[HIDDEN:] @ e if len(w) > HIDDEN else 0.0)))
            else:
                c.append(1.0)
            corrected = logits[row, k] + bias
            if temperature[row] == 0:
                drawn, draft = np.eye(len(corrected))[corrected.argmax()], corrected.argmax()
            else:
                drawn = softmax(corrected / temperature[row])
                draft = (drawn / noise[row, k]).argmax()
            over_target = np.zeros(VOCAB)
            over_target[target_ids] = drawn
            x = target_ids[draft]
            tokens.append(x)
            q.append(over_target)
    return (
        np.reshape(tokens, (len(anchors), SLOTS)),
        np.reshape(q, (len(anchors), SLOTS, VOCAB)),
        np.reshape(c, (len(anchors), SLOTS)),
    )


def inputs(draft_vocab: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(BATCH, SLOTS, HIDDEN)),
        "logits": 2 * rng.normal(size=(BATCH, SLOTS, draft_vocab)),
        "anchors": rng.integers(VOCAB, size=BATCH),
        "temperature": np.array([0.0, 0.6, 1.3]),
        "noise": rng.exponential(size=(BATCH, SLOTS, draft_vocab)),
    }


def draft(kind: str, tensors: dict[str, np.ndarray], given: dict[str, np.ndarray], **more) -> reference.Block:
    as_torch = {name: torch.from_numpy(value) for name, value in given.items()}
    return reference.draft_block({name: torch.from_numpy(value) for name, value in tensors.items()}, kind, **as_torch, **more)


CONFIDENCES = [(head, confidence) for head in HEADS for confidence in (None, "hidden", "markov") if head != "none"]
CONFIDENCES += [("none", None), ("none", "hidden")]


@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize(("kind", "confidence"), CONFIDENCES)
def test_reference_computes_its_formulas(kind, confidence, reduced):
    target_ids = np.array(KEPT if reduced else range(VOCAB))
    tensors, given = tensors_of(kind, confidence, len(target_ids)), inputs(len(target_ids))
    block = draft(kind, tensors, given, target_ids=torch.from_numpy(target_ids) if reduced else None, vocab_size=VOCAB)
    tokens, q, c = by_hand(tensors, kind, **given, target_ids=target_ids)
    assert block.tokens.tolist() == tokens.tolist()
    np.testing.assert_allclose(block.probabilities, q, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(block.confidences, c, rtol=1e-12)


def test_vanilla_worked_out_with_pencil():
    """Rank 1, two tokens, temperature 1/2; W1 = [1, 2], W2 = [0, ln 2]: a bias of x ln 2 on token 1, x = W1[previous]."""
    tensors = {
        "markov_head.markov_w1.weight": np.array([[1.0], [2.0]]),
        "markov_head.markov_w2.weight": np.array([[0.0], [math.log(2)]]),
        "confidence_head.proj.weight": np.array([[0.0, 1.0]]),
        "confidence_head.proj.bias": np.array([1.0]),
    }
    block = draft(
        "vanilla",
        tensors,
        {
            "hidden": np.zeros((1, 2, 1)),
            "logits": np.zeros((1, 2, 2)),
            "anchors": np.array([0]),
            "temperature": np.array([0.5]),
            "noise": np.ones((1, 2, 2)),
        },
    )
    # Slot 1 follows token 0: odds 2^(1/0.5) = 4; it draws token 1. Slot 2 follows token 1: odds 2^(2/0.5) = 16.
    assert block.tokens.tolist() == [[1, 1]]
    np.testing.assert_allclose(block.probabilities, [[[1 / 5, 4 / 5], [1 / 17, 16 / 17]]])
    np.testing.assert_allclose(block.confidences, [[sigmoid(2.0), sigmoid(3.0)]])


@pytest.mark.parametrize("kind", HEADS)
def test_q_is_a_distribution_and_one_hot_where_greedy(kind):
    given = inputs(len(KEPT))
    block = draft(kind, tensors_of(kind, None, len(KEPT)), given, target_ids=torch.tensor(KEPT), vocab_size=VOCAB)
    q = block.probabilities
    torch.testing.assert_close(q.sum(-1), torch.ones(BATCH, SLOTS, dtype=torch.float64))
    outside = [token for token in range(VOCAB) if token not in KEPT]
    assert (q[..., outside] == 0).all()
    greedy = given["temperature"] == 0
    one_hot = torch.nn.functional.one_hot(block.tokens, VOCAB).double()
    assert torch.equal(q[greedy], one_hot[greedy])
    assert (q[~greedy].max(-1).values < 1).all()


def test_the_previous_token_is_a_target_id():
    """Draft id 0 is target id 2. W1's row 2 forces draft id 1, its row 0 would force draft id 0."""
    w1 = np.zeros((VOCAB, RANK))
    w1[0], w1[2] = (9.0, 0.0), (0.0, 9.0)
    w2 = np.zeros((len(KEPT), RANK))
    w2[0], w2[1] = (9.0, 0.0), (0.0, 9.0)
    given = inputs(len(KEPT)) | {"logits": np.zeros((1, SLOTS, len(KEPT))), "anchors": np.array([0])}
    given |= {"temperature": np.zeros(1), "hidden": np.zeros((1, SLOTS, HIDDEN))}
    tensors = {"markov_head.markov_w1.weight": w1, "markov_head.markov_w2.weight": w2}
    block = draft("vanilla", tensors, given, target_ids=torch.tensor(KEPT), vocab_size=VOCAB)
    assert block.tokens[0, :2].tolist() == [KEPT[0], KEPT[1]]


@pytest.mark.parametrize("kind", HEADS[:3])
def test_confidence_does_not_depend_on_the_token_it_judges(kind):
    """c_k may know x_{k-1} but not x_k: what makes cutting lossless."""
    tensors, given = tensors_of(kind, "markov", VOCAB), inputs(VOCAB)
    given["temperature"][:] = 1.0
    before = draft(kind, tensors, given)
    given["noise"][:, -1] = np.roll(given["noise"][:, -1], 1, axis=-1)
    given["logits"][:, -1] = np.roll(given["logits"][:, -1], 3, axis=-1)
    after = draft(kind, tensors, given)
    assert (before.tokens[:, -1] != after.tokens[:, -1]).any(), "the last token did not change: nothing was tested"
    assert torch.equal(before.confidences, after.confidences)


def test_noise_is_drawn_when_absent():
    given = inputs(VOCAB)
    del given["noise"]
    given["temperature"][:] = 3.0
    torch.manual_seed(0)
    drawn = {tuple(draft("vanilla", tensors_of("vanilla", None, VOCAB), given).tokens.flatten().tolist()) for _ in range(5)}
    assert len(drawn) > 1


def test_a_row_does_not_depend_on_its_neighbours():
    tensors, given = tensors_of("rnn", "markov", VOCAB), inputs(VOCAB)
    together = draft("rnn", tensors, given)
    for row in range(BATCH):
        alone = draft("rnn", tensors, {name: value[row : row + 1] for name, value in given.items()})
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


def test_an_unknown_head_is_refused_by_name():
    with pytest.raises(ValueError, match="head type 'lstm'; expected one of vanilla, gated, rnn, none"):
        draft("lstm", {}, inputs(VOCAB))
