"""The plain-torch drafter: the checkpoints' names, Qwen3's arithmetic, and who sees what."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_dspark.checkpoint import check_tensors, load_spec
from vllm_dspark.heads.drafter import DraftAttention, Drafter, DrafterConfig, DraftLayer

CONFIG = DrafterConfig(
    vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, target_layer_ids=(0, 2, 5), block_size=4, mask_token_id=40, markov_rank=6,
)  # fmt: skip
CONTEXT = 11
ANCHORS = (3, 7, 10)  # positions; the last block reaches past the context


def drafter(**changes) -> Drafter:
    """Random, in float64; norms too, so that a norm left out shows."""
    torch.manual_seed(0)
    built = Drafter(dataclasses.replace(CONFIG, **changes)).double().requires_grad_(False)
    for parameter in built.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4 + (1.0 if parameter.dim() == 1 else 0.0))
    return built


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Target states ``[2, CONTEXT, m*d]``, block embeddings ``[2, A*block, d]`` and their positions, of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    queries = len(ANCHORS) * CONFIG.block_size
    aux = torch.randn(2, CONTEXT, 3 * CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(2, queries, CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[anchor + slot for anchor in ANCHORS for slot in range(CONFIG.block_size)]] * 2)
    return aux, embeddings, positions


def everywhere(aux: Tensor) -> Tensor:
    return torch.arange(aux.shape[1]).expand(aux.shape[:2])


def block_mask() -> Tensor:
    """Each query sees the context before its anchor and its own block."""
    owner = torch.arange(len(ANCHORS)).repeat_interleave(CONFIG.block_size)
    before = torch.arange(CONTEXT) < torch.tensor(ANCHORS)[owner, None]
    return torch.cat((before, owner[:, None] == owner), -1)[None, None]


def run(model: Drafter, aux: Tensor, embeddings: Tensor, positions: Tensor) -> Tensor:
    """Hidden states by block: ``[2, A, block, d]``."""
    hidden = model(embeddings, positions, model.context(aux, everywhere(aux)), block_mask())
    return hidden.unflatten(1, (len(ANCHORS), CONFIG.block_size))


# -- names --


HEADS = {
    "vanilla": {},
    "gated": {"markov_head.gate_proj.weight": (6, 30), "markov_head.gate_proj.bias": (6,)},
    "rnn": {"markov_head.joint_proj.weight": (18, 36), "markov_head.joint_proj.bias": (18,)},
}
W1_W2 = {"markov_head.markov_w1.weight": (41, 6), "markov_head.markov_w2.weight": (41, 6)}


@pytest.mark.parametrize(("kind", "more"), [*((kind, {**W1_W2, **own}) for kind, own in HEADS.items()), ("none", {})])
def test_parameters_are_the_checkpoints_tensors(kind, more):
    built = drafter(markov_head_type=kind, num_hidden_layers=1)
    expected = {
        "fc.weight": (24, 72), "hidden_norm.weight": (24,), "norm.weight": (24,),
        "layers.0.input_layernorm.weight": (24,), "layers.0.post_attention_layernorm.weight": (24,),
        "layers.0.self_attn.q_proj.weight": (32, 24), "layers.0.self_attn.k_proj.weight": (16, 24),
        "layers.0.self_attn.v_proj.weight": (16, 24), "layers.0.self_attn.o_proj.weight": (24, 32),
        "layers.0.self_attn.q_norm.weight": (8,), "layers.0.self_attn.k_norm.weight": (8,),
        "layers.0.mlp.gate_proj.weight": (40, 24), "layers.0.mlp.up_proj.weight": (40, 24),
        "layers.0.mlp.down_proj.weight": (24, 40),
        "confidence_head.proj.weight": (1, 24 if kind == "none" else 30), "confidence_head.proj.bias": (1,),
        **more,
    }  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == expected


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("kind", [*HEADS, "none"])
def test_what_it_saves_is_a_checkpoint(kind, with_markov, tmp_path):
    rank = 0 if kind == "none" else CONFIG.markov_rank
    config = dataclasses.replace(CONFIG, markov_head_type=kind, markov_rank=rank, confidence_head_with_markov=with_markov)
    save_file(Drafter(config).state_dict(), tmp_path / "model.safetensors")
    fields = dataclasses.asdict(config) | {"confidence_head_with_markov": with_markov and kind != "none"}
    described = {**fields, "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "enable_confidence_head": True}
    (tmp_path / "config.json").write_text(json.dumps(described))
    spec = load_spec(str(tmp_path))
    check_tensors(spec)
    assert (spec.head, spec.rank) == (kind, rank)


@pytest.mark.parametrize("kind", HEADS)
def test_rank_0_is_no_head_whatever_its_type(kind):
    built = drafter(markov_head_type=kind, markov_rank=0)
    assert built.markov_head is None
    assert built.confidence_head.proj.weight.shape == (1, CONFIG.hidden_size)
    assert not any(name.startswith("markov_head") for name in built.state_dict())


# -- who sees what --


@pytest.mark.parametrize("block", range(len(ANCHORS)))
def test_a_block_does_not_see_context_at_or_after_its_anchor(block):
    model = drafter()
    aux, embeddings, positions = inputs()
    spoiled = aux.clone()
    spoiled[:, ANCHORS[block] :] = 1e3
    before, after = run(model, aux, embeddings, positions), run(model, spoiled, embeddings, positions)
    assert torch.equal(before[:, : block + 1], after[:, : block + 1])
    assert all((before[:, later] != after[:, later]).any() for later in range(block + 1, len(ANCHORS)))


@pytest.mark.parametrize("block", range(len(ANCHORS)))
def test_a_block_sees_the_context_just_before_its_anchor(block):
    model = drafter()
    aux, embeddings, positions = inputs()
    changed = aux.clone()
    changed[:, ANCHORS[block] - 1] += 1
    difference = run(model, aux, embeddings, positions) - run(model, changed, embeddings, positions)
    assert (difference[:, block].abs().amax(-1) > 1e-6).all(), "some slot of the block does not see it"


@pytest.mark.parametrize("block", range(len(ANCHORS)))
def test_a_block_does_not_see_other_blocks(block):
    model = drafter()
    aux, embeddings, positions = inputs()
    spoiled = embeddings.clone()
    own = slice(block * CONFIG.block_size, (block + 1) * CONFIG.block_size)
    spoiled[:, : own.start] = spoiled[:, own.stop :] = 1e3
    before, after = run(model, aux, embeddings, positions), run(model, aux, spoiled, positions)
    assert torch.equal(before[:, block], after[:, block])


def test_every_slot_sees_every_slot_of_its_block():
    """The block is not causal: slot 0 must know how many masks follow it."""
    model = drafter()
    aux, embeddings, positions = inputs()
    before = run(model, aux, embeddings, positions)
    for slot in range(CONFIG.block_size):
        changed = embeddings.clone()
        changed[:, slot] += 1  # of block 0
        difference = (run(model, aux, changed, positions) - before).abs().amax(-1)
        assert (difference[:, 0] > 1e-6).all()
        assert (difference[:, 1:] == 0).all()


def test_sequences_do_not_see_each_other():
    model = drafter()
    aux, embeddings, positions = inputs()
    together = run(model, aux, embeddings, positions)
    for row in range(2):
        alone = run(model, aux[row : row + 1], embeddings[row : row + 1], positions[row : row + 1])
        torch.testing.assert_close(together[row], alone[0])


def test_masked_is_as_good_as_absent():
    """The training layout, all blocks in one forward, gives what one block on its own short context gives."""
    model = drafter()
    aux, embeddings, positions = inputs()
    together = run(model, aux, embeddings, positions)
    for block, anchor in enumerate(ANCHORS):
        own = slice(block * CONFIG.block_size, (block + 1) * CONFIG.block_size)
        seen = aux[:, :anchor]
        mask = torch.ones(1, 1, CONFIG.block_size, anchor + CONFIG.block_size, dtype=torch.bool)
        alone = model(embeddings[:, own], positions[:, own], model.context(seen, everywhere(seen)), mask)
        torch.testing.assert_close(together[:, block], alone)


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 3), tuple(range(1, CONTEXT))], ids=str)
def test_context_kept_in_pieces_is_the_context_of_the_whole(cuts):
    model = drafter()
    aux, embeddings, positions = inputs()
    where = everywhere(aux)
    whole = model.context(aux, where)
    bounds = [0, *cuts, CONTEXT]
    pieces = [model.context(aux[:, a:b], where[:, a:b]) for a, b in itertools.pairwise(bounds)]
    kept = [tuple(torch.cat(parts, 2) for parts in zip(*layer, strict=True)) for layer in zip(*pieces, strict=True)]
    for mine, theirs in zip(kept, whole, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        model(embeddings, positions, kept, block_mask()), model(embeddings, positions, whole, block_mask())
    )


def test_only_distances_between_positions_matter():
    model = drafter()
    aux, embeddings, positions = inputs()
    where = everywhere(aux)

    def at(context_shift: int, block_shift: int) -> Tensor:
        return model(embeddings, positions + block_shift, model.context(aux, where + context_shift), block_mask())

    # Angles are float32, as Qwen3's are.
    torch.testing.assert_close(at(0, 0), at(100, 100), rtol=1e-4, atol=1e-4)
    assert (at(0, 0) - at(0, 1)).abs().max() > 1e-2


# -- what surrounds the layers --


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def test_context_comes_from_projected_then_normed_states():
    model = drafter()
    aux, _, _ = inputs()
    states = rms_norm(aux @ model.fc.weight.T, model.hidden_norm.weight)
    for layer, (keys, values) in zip(model.layers, model.context(aux, everywhere(aux)), strict=True):
        attention = layer.self_attn
        projected = (states @ attention.v_proj.weight.T).unflatten(-1, (-1, CONFIG.head_dim)).transpose(1, 2)
        torch.testing.assert_close(values, projected)
        normed = rms_norm((states @ attention.k_proj.weight.T).unflatten(-1, (-1, CONFIG.head_dim)), attention.k_norm.weight)
        torch.testing.assert_close(keys[:, :, 0], normed.transpose(1, 2)[:, :, 0])  # position 0 is not rotated


def test_hidden_states_are_normed_at_the_end():
    model = drafter()
    aux, embeddings, positions = inputs()
    context, mask = model.context(aux, everywhere(aux)), block_mask()
    expected = embeddings
    for layer, keys_values in zip(model.layers, context, strict=True):
        expected = layer(expected, positions, keys_values, mask)
    torch.testing.assert_close(model(embeddings, positions, context, mask), rms_norm(expected, model.norm.weight))


# -- Qwen3's arithmetic; its norms and angles are float32 --


@pytest.fixture(scope="module")
def qwen3():
    """transformers' Qwen3 module and a config of our sizes."""
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    config = modeling.Qwen3Config(
        vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_theta=CONFIG.rope_theta, rms_norm_eps=CONFIG.rms_norm_eps,
        attn_implementation="eager",
    )  # fmt: skip
    return modeling, config


def qwen3_angles(qwen3, positions: Tensor) -> tuple[Tensor, Tensor]:
    modeling, config = qwen3
    return modeling.Qwen3RotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), positions)


def test_attention_is_qwen3s_over_context_and_block_in_one_sequence(qwen3):
    modeling, config = qwen3
    own = drafter().layers[0].self_attn
    assert isinstance(own, DraftAttention)
    theirs = modeling.Qwen3Attention(config, layer_idx=0).double()
    theirs.load_state_dict(own.state_dict())
    states, x = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, 4, 24, dtype=torch.float64)
    positions = torch.arange(13).expand(2, 13)
    mask = torch.ones(1, 1, 4, 13, dtype=torch.bool)
    mask[..., 6:9] = False
    allowed = torch.ones(1, 1, 13, 13, dtype=torch.bool)
    allowed[:, :, 9:] = mask
    bias = torch.zeros_like(allowed, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    expected, _ = theirs(
        hidden_states=torch.cat((states, x), 1), position_embeddings=qwen3_angles(qwen3, positions), attention_mask=bias
    )
    found = own(x, positions[:, 9:], own.keys_values(states, positions[:, :9]), mask)
    torch.testing.assert_close(found, expected[:, 9:], rtol=1e-4, atol=2e-5)


def test_a_layer_is_qwen3s(qwen3):
    modeling, config = qwen3
    own = drafter().layers[1]
    assert isinstance(own, DraftLayer)
    theirs = modeling.Qwen3DecoderLayer(config, layer_idx=0).double()
    theirs.load_state_dict(own.state_dict())
    x, positions = torch.randn(2, 5, 24, dtype=torch.float64), torch.arange(3, 8).expand(2, 5)
    expected = theirs(
        x, attention_mask=torch.zeros(2, 1, 5, 5, dtype=torch.float64), position_embeddings=qwen3_angles(qwen3, positions)
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    nothing = torch.zeros(2, 2, 0, 8, dtype=torch.float64)
    found = own(x, positions, (nothing, nothing), torch.ones(1, 1, 5, 5, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
