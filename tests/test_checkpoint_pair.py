"""A drafter that cannot work for a target is refused before weights load, with both sides' values in the message."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoints import write_drafter

from vllm_dspark.checkpoint import (
    BlockSizeError,
    CheckpointError,
    ConfigError,
    DrafterSpec,
    HiddenSizeError,
    MaskTokenError,
    TargetFacts,
    TargetLayersError,
    TensorInfo,
    TensorsError,
    TokenizerMismatchWarning,
    VocabularyError,
    check_pair,
    check_tensors,
    expected_tensors,
    load_spec,
)

TARGET = TargetFacts(model="tiny/target", vocab_size=128, hidden_size=64, num_hidden_layers=4)


def facts(**changes: Any) -> TargetFacts:
    return dataclasses.replace(TARGET, **changes)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> DrafterSpec:
    """A drafter that fits `TARGET`; cases below change one thing about it or about the target."""
    spec = load_spec(write_drafter(tmp_path_factory.mktemp("fits")))
    check_pair(spec, TARGET, spec.num_draft_tokens)
    return spec


def without(spec: DrafterSpec, *names: str) -> DrafterSpec:
    assert set(names) <= set(spec.tensors)
    return dataclasses.replace(spec, tensors={k: v for k, v in spec.tensors.items() if k not in names})


# -- block size --


@pytest.mark.parametrize(("anchor", "most"), [(True, 4), (False, 3)])
def test_as_many_drafts_as_trained_are_accepted_and_one_more_is_refused(drafter: DrafterSpec, anchor: bool, most: int) -> None:
    spec = dataclasses.replace(drafter, sample_from_anchor=anchor)
    for k in range(1, most + 1):
        check_pair(spec, TARGET, k)
    with pytest.raises(BlockSizeError) as caught:
        check_pair(spec, TARGET, most + 1)
    message = str(caught.value)
    assert f"num_speculative_tokens is {most + 1}" in message
    assert "block_size is 4" in message
    assert f"Set num_speculative_tokens to {most} or less" in message
    assert ("sample_from_anchor is false" in message) == (not anchor)


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_draft_is_refused(drafter: DrafterSpec, k: int) -> None:
    with pytest.raises(BlockSizeError, match=f"num_speculative_tokens is {k}, .* drafts 1 to 4"):
        check_pair(drafter, TARGET, k)


# -- one error class per mismatch, both values in its message --

MISMATCHES = [
    pytest.param({}, {"hidden_size": 80}, HiddenSizeError, ["width 64", "width 80"], id="target-wider"),
    pytest.param({"target_hidden_size": 96}, {}, HiddenSizeError, ["width 96", "width 64"], id="trained-wider"),
    pytest.param({}, {"num_hidden_layers": 2}, TargetLayersError, ["[0, 2]", "2 layers", "[2] do", "to 1"], id="layers"),
    pytest.param({"target_layer_ids": (-2, 1)}, {}, TargetLayersError, ["[-2, 1]", "4 layers", "[-2] do"], id="below"),
    pytest.param({"target_layer_ids": (2, 0)}, {}, TargetLayersError, ["[2, 0]", "[0, 2]", "ascending"], id="order"),
    pytest.param({"target_layer_ids": (1, 1)}, {}, TargetLayersError, ["[1, 1]", "[1]", "repeats"], id="repeated"),
    pytest.param({}, {"vocab_size": 160}, VocabularyError, ["vocab_size 128", "has 160", "no rows"], id="vocab-small"),
    pytest.param({"draft_vocab_size": 200}, {}, VocabularyError, ["draft_vocab_size 200", "128"], id="draft-vocab"),
    pytest.param({"mask_token_id": 128}, {}, MaskTokenError, ["mask_token_id 128", "vocab_size is 128"], id="mask"),
    pytest.param({"mask_token_id": -1}, {}, MaskTokenError, ["mask_token_id -1", "0 to 127"], id="mask-negative"),
]


@pytest.mark.parametrize(("drafter_changes", "target_changes", "error", "words"), MISMATCHES)
def test_a_mismatch_is_refused_by_its_own_error_with_both_values_and_both_names(
    drafter: DrafterSpec,
    drafter_changes: dict[str, Any],
    target_changes: dict[str, Any],
    error: type[CheckpointError],
    words: list[str],
) -> None:
    spec = dataclasses.replace(drafter, **drafter_changes)
    with pytest.raises(CheckpointError) as caught:
        check_pair(spec, facts(**target_changes), 3)
    assert type(caught.value) is error
    message = str(caught.value)
    assert [
        word for word in [*words, spec.model, "wanted" if error is not HiddenSizeError else "Use"] if word not in message
    ] == []
    assert error is MaskTokenError or "tiny/target" in message


def test_the_embedding_output_and_the_last_layer_are_valid_target_layers(tmp_path: Path) -> None:
    spec = load_spec(write_drafter(tmp_path, target_layer_ids=(-1, 3)))
    check_pair(spec, TARGET)
    with pytest.raises(TargetLayersError, match=r"\[3\] do not exist"):
        check_pair(spec, facts(num_hidden_layers=3))


# -- vocabularies of other sizes --


def test_a_padded_vocabulary_needs_its_own_embeddings(tmp_path: Path) -> None:
    padded = load_spec(write_drafter(tmp_path, vocab_size=160))
    check_pair(padded, TARGET)
    with pytest.raises(VocabularyError) as caught:
        check_pair(without(padded, "embed_tokens.weight"), TARGET)
    assert all(word in str(caught.value) for word in ("vocab_size 160", "has 128", "embed_tokens.weight"))


def test_a_padded_vocabulary_cannot_share_the_targets_output_head(tmp_path: Path) -> None:
    padded = load_spec(write_drafter(tmp_path, vocab_size=160, owns_lm_head=False))
    with pytest.raises(TensorsError, match=r"lm_head.weight is missing, wanted \[160, 64\].*cannot be shared"):
        check_pair(padded, TARGET)


@pytest.mark.parametrize(("name", "shape"), [("lm_head.weight", "[32, 64]"), ("d2t", "[32]")])
def test_a_reduced_vocabulary_needs_its_own_head_and_offsets(tmp_path: Path, name: str, shape: str) -> None:
    reduced = load_spec(write_drafter(tmp_path, draft_vocab_size=32))
    check_pair(reduced, TARGET)
    check_pair(without(reduced, "t2d", "embed_tokens.weight"), TARGET)
    with pytest.raises(TensorsError) as caught:
        check_pair(without(reduced, name), TARGET)
    message = str(caught.value)
    assert "1 of the tensors do not fit" in message
    assert "draft vocabulary 32 of 128" in message
    assert f"{name} is missing, wanted {shape} (" in message


def test_a_gemma4_drafter_with_a_reduced_vocabulary_is_refused(tmp_path: Path) -> None:
    spec = load_spec(write_drafter(tmp_path, family="gemma4", config={"draft_vocab_size": 32}))
    with pytest.raises(VocabularyError, match=r"draft_vocab_size 32, but .* all 128 ids"):
        check_pair(spec, TARGET)


def test_a_drafter_of_another_width_must_bring_embeddings_and_head(tmp_path: Path) -> None:
    narrow = load_spec(write_drafter(tmp_path, hidden_size=48, target_hidden_size=64))
    check_pair(narrow, TARGET)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        with pytest.raises(HiddenSizeError, match="width 48 and tiny/target width 64"):
            check_pair(without(narrow, name), TARGET)


# -- tensors --

VARIANTS = [
    pytest.param({"head": "vanilla"}, id="vanilla"),
    pytest.param({"head": "gated", "confidence": "hidden"}, id="gated"),
    pytest.param({"head": "rnn", "draft_vocab_size": 32}, id="rnn-reduced"),
    pytest.param({"head": "none", "attention_bias": True}, id="no-head-biases"),
    pytest.param({"family": "gemma4"}, id="gemma4"),
    pytest.param({"family": "gemma4", "k_eq_v": False, "attention_bias": True}, id="gemma4-values"),
]
# What vLLM does without: the target's copies, the training-only mask, a buffer that starts at one.
OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "t2d", "layer_scalar")


@pytest.mark.parametrize("options", VARIANTS)
def test_every_tensor_is_missed_by_name_and_misshapes_are_shown_with_both_shapes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    spec = load_spec(write_drafter(tmp_path, **options))
    optional = OPTIONAL if "draft_vocab_size" not in options else ("embed_tokens.weight", "t2d")
    tried = 0
    for name, info in spec.tensors.items():
        if not name.endswith(optional):
            with pytest.raises(TensorsError) as caught:
                check_pair(without(spec, name), TARGET)
            assert f": {name} is missing, wanted {list(info.shape)}" in str(caught.value)
            tried += 1
        else:
            check_pair(without(spec, name), TARGET)
        if name == "t2d":
            continue
        grown = (info.shape[0] + 1, *info.shape[1:])
        with pytest.raises(TensorsError) as caught:
            check_pair(dataclasses.replace(spec, tensors={**spec.tensors, name: TensorInfo(grown, info.dtype)}), TARGET)
        assert f": {name} is {list(grown)}, wanted {list(info.shape)}" in str(caught.value)
    assert tried > 25


def test_all_offending_tensors_are_counted_and_the_first_dozen_listed(drafter: DrafterSpec) -> None:
    required = [name for name, want in expected_tensors(drafter).items() if want.required]
    assert len(required) > 13
    with pytest.raises(TensorsError) as caught:
        check_tensors(dataclasses.replace(drafter, tensors={}))
    message = str(caught.value)
    assert f"{len(required)} of the tensors do not fit" in message
    assert f"and {len(required) - 12} more" in message
    assert message.count("is missing") == 12


@pytest.mark.parametrize(("stored", "declared"), [("gated", "vanilla"), ("rnn", "gated"), ("vanilla", "none")])
def test_weights_of_another_head_than_declared_are_refused(tmp_path: Path, stored: str, declared: str) -> None:
    folder = write_drafter(tmp_path, head=stored, confidence="hidden", config={"markov_head_type": declared})
    if declared == "none":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "markov_rank": 0}))
    foreign = {"gated": "gate_proj", "rnn": "joint_proj", "vanilla": "markov_w1"}[stored]
    with pytest.raises(TensorsError, match=rf"markov_head\.{foreign}\.weight .* belongs to no '{declared}' head"):
        check_pair(load_spec(folder), TARGET)


def test_a_quantised_checkpoint_is_checked_for_modules_only(drafter: DrafterSpec) -> None:
    quantized = dataclasses.replace(drafter, quantized=True)
    name = "layers.0.mlp.down_proj."
    packed = {k: v for k, v in drafter.tensors.items() if k != name + "weight"}
    packed |= {name + "weight_packed": TensorInfo((64, 12), "I32"), name + "weight_scale": TensorInfo((64, 1), "F32")}
    check_pair(dataclasses.replace(quantized, tensors=packed), TARGET)
    with pytest.raises(TensorsError, match=r"layers\.0\.mlp\.down_proj\.weight is missing"):
        check_pair(without(quantized, name + "weight"), TARGET)


# -- what is known of a target --

FLAT = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 12, "architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(FLAT, id="flat"),
        pytest.param(SimpleNamespace(**FLAT), id="object"),
        pytest.param({"vocab_size": 7, "text_config": FLAT}, id="nested"),
        pytest.param(SimpleNamespace(vocab_size=7, text_config=SimpleNamespace(**FLAT)), id="nested-object"),
        pytest.param({"thinker_config": {"text_config": FLAT}, "talker_config": {"hidden_size": 7}}, id="nested-twice"),
    ],
)
def test_target_facts_come_from_the_language_models_part_of_any_config(config: object) -> None:
    expected = TargetFacts(model="a/b", vocab_size=1000, hidden_size=256, num_hidden_layers=12, tokenizer="t.json")
    assert TargetFacts.from_config(config, model="a/b", tokenizer="t.json") == expected


def test_a_target_config_without_a_size_is_refused_by_its_name() -> None:
    config = {name: value for name, value in FLAT.items() if name != "hidden_size"}
    with pytest.raises(ConfigError, match="target a/b has hidden_size None"):
        TargetFacts.from_config(config, model="a/b")


# -- tokenizers --


def tokenizer(folder: Path, words: list[str], *, kind: str = "bpe", added: Sequence[str] = ()) -> str:
    """A tokenizer.json with `words` as ids 0… and `added` after them."""
    vocab: Any = {word: i for i, word in enumerate(words)} if kind == "bpe" else [[word, -1.0] for word in words]
    extra = [{"id": len(words) + i, "content": word} for i, word in enumerate(added)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": extra}))
    return str(folder)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        pytest.param({"words": ["a", "b", "X"]}, ["1 shared ids", "id 2 is 'c' and 'X'"], id="another-token"),
        pytest.param({"words": ["a", "b", "c"], "added": ["<s>"]}, ["(3 tokens)", "(4 tokens)"], id="more-tokens"),
    ],
)
def test_tokenizers_that_differ_warn_with_both_sides_and_are_no_error(
    drafter: DrafterSpec, tmp_path: Path, theirs: dict[str, Any], words: list[str]
) -> None:
    ours = tokenizer(tmp_path / "drafter", ["a", "b", "c"]) + "/tokenizer.json"
    target = facts(tokenizer=tokenizer(tmp_path / "target", **theirs))
    with pytest.warns(TokenizerMismatchWarning) as caught:
        check_pair(dataclasses.replace(drafter, tokenizer=ours), target)
    (message,) = [str(warning.message) for warning in caught]
    assert all(word in message for word in [*words, drafter.model, "tiny/target"])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_equal_tokenizers_do_not_warn(drafter: DrafterSpec, tmp_path: Path, kind: str) -> None:
    ours = tokenizer(tmp_path / "drafter", ["a", "b"], kind=kind, added=["<s>"])
    theirs = tokenizer(tmp_path / "target", ["a", "b", "<s>"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pair(dataclasses.replace(drafter, tokenizer=ours), facts(tokenizer=theirs))


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"model": {"type": "BPE"}}'])
def test_tokenizers_that_cannot_be_compared_are_passed_over(drafter: DrafterSpec, tmp_path: Path, content: str | None) -> None:
    ours = tokenizer(tmp_path / "drafter", ["a"])
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pair(dataclasses.replace(drafter, tokenizer=ours), facts(tokenizer=str(tmp_path)))


def test_a_drafters_own_tokenizer_is_found_in_its_folder(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path)
    assert load_spec(folder).tokenizer is None
    tokenizer(folder, ["a"])
    assert load_spec(folder).tokenizer == str(folder / "tokenizer.json")
