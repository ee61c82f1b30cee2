"""Every published layout is read into the one description, with the values that were written."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_checkpoints import Tiny, write_drafter

from vllm_dspark.checkpoint import (
    ConfigError,
    NotADrafterError,
    SlotLayoutWarning,
    TargetFacts,
    UnknownHeadError,
    check_pair,
    load_spec,
)

TINY = Tiny()
TARGET = TargetFacts(model="tiny/target", vocab_size=128, hidden_size=64, num_hidden_layers=4)

CASES = [
    pytest.param(head, layout, family, anchor, draft_vocab, id=f"{head}-{layout}-{family}-{anchor}-{draft_vocab}")
    for head in ("vanilla", "gated", "rnn", "none")
    for layout in ("deepspec", "speculators")
    for family in ("qwen3", "gemma4")
    for anchor in (True, False)
    for draft_vocab in (None, 32)
    if family == "qwen3" or (layout == "deepspec" and draft_vocab is None)
]


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change config.json's top-level values; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(("head", "layout", "family", "anchor", "draft_vocab"), CASES)
def test_a_drafter_is_described_as_it_was_written_and_fits_its_target(
    tmp_path: Path, head: str, layout: str, family: str, anchor: bool, draft_vocab: int | None
) -> None:
    folder = write_drafter(
        tmp_path, head=head, layout=layout, family=family, sample_from_anchor=anchor, draft_vocab_size=draft_vocab
    )
    spec = load_spec(folder)
    assert (spec.layout, spec.family, spec.model) == (layout, family, str(folder))
    assert (spec.head, spec.rank) == (head, 0 if head == "none" else TINY.rank)
    assert spec.confidence == ("hidden" if head == "none" else "markov")
    assert (spec.block_size, spec.sample_from_anchor) == (4, anchor)
    assert spec.num_draft_tokens == (4 if anchor else 3)
    assert (spec.target_layer_ids, spec.aux_hidden_state_layer_ids) == ((0, 2), (1, 3))
    assert (spec.vocab_size, spec.draft_vocab_size, spec.mask_token_id) == (128, draft_vocab or 128, 127)
    assert (spec.hidden_size, spec.target_hidden_size, spec.intermediate_size) == (64, 64, 96)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (2, 4, 2, 32)
    assert spec.owns_embeddings
    assert spec.owns_lm_head
    stored = load_file(folder / "model.safetensors")
    assert {name: info.shape for name, info in spec.tensors.items()} == {k: tuple(v.shape) for k, v in stored.items()}
    assert spec.tensors["fc.weight"].dtype == "F32"
    check_pair(spec, TARGET, spec.num_draft_tokens)


@pytest.mark.parametrize("anchor", [True, False])
def test_both_layouts_of_one_drafter_give_one_description(tmp_path: Path, anchor: bool) -> None:
    specs = [
        load_spec(write_drafter(tmp_path / layout, layout=layout, head="rnn", sample_from_anchor=anchor))
        for layout in ("deepspec", "speculators")
    ]
    same = {"model": "", "layout": "deepspec"}
    assert dataclasses.replace(specs[0], **same) == dataclasses.replace(specs[1], **same)  # type: ignore[arg-type]
    assert specs[0].tensors == specs[1].tensors


def test_shards_give_the_description_of_a_single_file(tmp_path: Path) -> None:
    single = load_spec(write_drafter(tmp_path / "one"))
    sharded = load_spec(write_drafter(tmp_path / "three", shards=3))
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert sharded.tensors == single.tensors
    # Without the index the numbered files are enough, as for vLLM.
    (tmp_path / "three" / "model.safetensors.index.json").unlink()
    assert load_spec(tmp_path / "three").tensors == single.tensors


@pytest.mark.parametrize(("embeddings", "lm_head"), [(True, False), (False, True), (False, False)])
def test_shared_embeddings_and_head_are_seen_as_absent_and_still_fit(tmp_path: Path, embeddings: bool, lm_head: bool) -> None:
    spec = load_spec(write_drafter(tmp_path, owns_embeddings=embeddings, owns_lm_head=lm_head))
    assert (spec.owns_embeddings, spec.owns_lm_head) == (embeddings, lm_head)
    check_pair(spec, TARGET)


# -- slot layout --


@pytest.mark.parametrize(
    ("tokens", "assumed", "reason"),
    [
        pytest.param(4, True, "drafts 4 tokens of block_size 4", id="promises-block"),
        pytest.param(3, False, "drafts 3 tokens of block_size 4", id="promises-one-less"),
        pytest.param(2, True, "the speculators library's default", id="promises-neither"),
        pytest.param(None, True, "the speculators library's default", id="promises-nothing"),
    ],
)
def test_a_speculators_config_without_slot_layout_is_guessed_from_its_promise_with_a_warning_that_names_the_option(
    tmp_path: Path, tokens: int | None, assumed: bool, reason: str
) -> None:
    methods = [] if tokens is None else [{"proposal_type": "greedy", "speculative_tokens": tokens}]
    folder = write_drafter(tmp_path, layout="speculators", sample_from_anchor=None)
    rewrite(folder, speculators_config={"algorithm": "dspark", "proposal_methods": methods})
    with pytest.warns(SlotLayoutWarning) as caught:
        spec = load_spec(folder)
    assert spec.sample_from_anchor is assumed
    assert spec.num_draft_tokens == (4 if assumed else 3)
    (message,) = [str(warning.message) for warning in caught]
    assert reason in message
    assert f"assuming {str(assumed).lower()}" in message
    assert f"option sample_from_anchor to {str(not assumed).lower()}" in message
    assert message in spec.notes
    assert caught[0].filename == __file__, "the warning should point at the caller"


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("declared", [True, False, None])
@pytest.mark.parametrize("layout", ["deepspec", "speculators"])
def test_the_option_overrides_every_declaration_silently(
    tmp_path: Path, layout: str, declared: bool | None, override: bool
) -> None:
    folder = write_drafter(tmp_path, layout=layout, sample_from_anchor=declared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = load_spec(folder, sample_from_anchor=override)
    assert (spec.sample_from_anchor, spec.notes) == (override, ())


def test_a_deepspec_config_without_slot_layout_predicts_from_the_anchor_without_a_warning(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, sample_from_anchor=True)
    assert "sample_from_anchor" not in json.loads((folder / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_spec(folder).sample_from_anchor is True


def test_a_fill_in_block_of_one_slot_is_refused(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, sample_from_anchor=False, block_size=1)
    with pytest.raises(ConfigError, match=r"block_size is 1.*wanted ≥ 2"):
        load_spec(folder)


# -- variants of the config --


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"target_layer_ids": [-1, 3]}, (-1, 3), id="embedding-output"),
        pytest.param({"target_layer_ids": None, "dflash_config": {"target_layer_ids": [1, 3]}}, (1, 3), id="nested"),
        pytest.param({"dflash_config": {"target_layer_ids": [1, 3]}}, (1, 3), id="nested-wins"),
        pytest.param({"target_layer_ids": None, "dspark_target_layer_ids": [1, 3]}, (1, 3), id="prefixed"),
        pytest.param({"target_layer_ids": None, "eagle_aux_hidden_state_layer_ids": [0, 4]}, (-1, 3), id="vllm-ids"),
    ],
)
def test_target_layers_are_found_where_vllm_finds_them(
    tmp_path: Path, changes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    folder = rewrite(write_drafter(tmp_path), **changes)
    assert load_spec(folder).target_layer_ids == expected


def test_the_mask_token_in_a_nested_section_wins_as_in_vllm(tmp_path: Path) -> None:
    folder = rewrite(write_drafter(tmp_path), dflash_config={"mask_token_id": 5})
    assert load_spec(folder).mask_token_id == 5


@pytest.mark.parametrize(
    ("architecture", "model_type", "loaded_as"),
    [
        ("Qwen3DSparkModel", "qwen3", "Qwen3DSparkModel"),
        ("Qwen3OmniDSparkModel", "qwen3", "Qwen3OmniDSparkModel"),
        ("DSparkDraftModel", "qwen3", "Qwen3DSparkModel"),
    ],
)
def test_architectures_are_named_as_vllm_loads_them(tmp_path: Path, architecture: str, model_type: str, loaded_as: str) -> None:
    folder = rewrite(write_drafter(tmp_path), architectures=[architecture], model_type=model_type)
    spec = load_spec(folder)
    assert (spec.architecture, spec.family) == (loaded_as, "qwen3")


def test_a_missing_head_dim_is_what_each_reader_assumes(tmp_path: Path) -> None:
    # transformers' Qwen3Config says 128; vLLM reads a speculators backbone without it as hidden / heads.
    deepspec = rewrite(write_drafter(tmp_path / "deepspec"), head_dim=None)
    assert load_spec(deepspec).head_dim == 128
    speculators = write_drafter(tmp_path / "speculators", layout="speculators")
    layer = json.loads((speculators / "config.json").read_text())["transformer_layer_config"]
    rewrite(speculators, transformer_layer_config={k: v for k, v in layer.items() if k != "head_dim"})
    assert load_spec(speculators).head_dim == 64 // 4


def test_a_head_of_rank_zero_is_no_head_whatever_its_type_says(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, head="none", config={"markov_head_type": "gated"})
    assert load_spec(folder).head == "none"


@pytest.mark.parametrize("written", ["markov", "hidden", "none"])
def test_confidence_flags_left_out_are_read_off_the_tensors(tmp_path: Path, written: str) -> None:
    folder = write_drafter(tmp_path, confidence=written, drop_config={"enable_confidence_head", "confidence_head_with_markov"})
    assert load_spec(folder).confidence == written


def test_a_promised_but_missing_confidence_head_is_noted_and_does_without(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, drop_tensors={"confidence_head.proj.weight", "confidence_head.proj.bias"})
    spec = load_spec(folder)
    assert spec.confidence == "none"
    assert "confidence_head.proj.weight" in spec.notes[0]
    check_pair(spec, TARGET)


# -- Gemma 4 --


def test_gemma4_without_shared_keys_and_values_has_value_projections_and_a_note(tmp_path: Path) -> None:
    spec = load_spec(write_drafter(tmp_path, family="gemma4", k_eq_v=False))
    assert not spec.k_eq_v
    assert "layers.0.self_attn.v_proj.weight" in spec.tensors
    assert "vLLM 0.32" in spec.notes[0]
    check_pair(spec, TARGET)


def test_gemma4_layers_in_the_resolved_form_of_newer_transformers_are_the_same_drafter(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, family="gemma4")
    before = load_spec(folder)
    rewrite(
        folder,
        global_head_dim=None,
        num_global_key_value_heads=None,
        per_layer_config={str(layer): {"head_dim": 32, "num_key_value_heads": 2} for layer in range(2)},
    )
    assert load_spec(folder) == before


def test_gemma4_layers_that_differ_are_refused_with_both_shapes(tmp_path: Path) -> None:
    folder = rewrite(write_drafter(tmp_path, family="gemma4"), layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(ConfigError, match=r"\(16, 4, False\), \(32, 2, True\)"):
        load_spec(folder)


# -- what is refused --


@pytest.mark.parametrize(("name", "nearest"), [("gate", "gated"), ("vanila", "vanilla"), ("lstm-rnn", "rnn")])
def test_an_unknown_head_type_is_answered_with_the_nearest_valid_one(tmp_path: Path, name: str, nearest: str) -> None:
    folder = rewrite(write_drafter(tmp_path), markov_head_type=name)
    with pytest.raises(UnknownHeadError) as caught:
        load_spec(folder)
    assert f"{name!r}" in str(caught.value)
    assert f"did you mean {nearest!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, ["Qwen3ForCausalLM", "target model"]),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {}}, ["DFlashDraftModel", "method 'dflash'"]),
        ({"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 5}, ["DeepseekV4", "VLLM_DSPARK=0"]),
        ({"architectures": ["K3DSparkModel"], "model_type": "k3_dspark"}, ["K3DSparkModel", "VLLM_DSPARK=0"]),
        ({"speculators_model_type": "eagle3"}, ["'eagle3'", "wanted 'dspark'"]),
        ({"model_type": "bert"}, ["none (model_type 'bert')", "Qwen3DSparkModel"]),
        ({}, ["none", "Gemma4DSparkModel"]),
    ],
)
def test_other_models_are_refused_by_what_they_are(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotADrafterError) as caught:
        load_spec(tmp_path)
    assert all(word in str(caught.value) for word in [*words, str(tmp_path)])


# -- the object itself --


def test_a_description_cannot_be_changed_and_can_be_sent_to_another_process(tmp_path: Path) -> None:
    spec = load_spec(write_drafter(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.block_size = 8  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert isinstance(hash(spec), int)


def test_importing_the_module_loads_no_heavy_library() -> None:
    heavy = {"torch", "vllm", "transformers", "huggingface_hub", "safetensors"}
    code = f"import sys, vllm_dspark.checkpoint; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "[]"
