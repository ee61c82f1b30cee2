"""Every way a folder can be broken is told apart, by error class and by message."""

from __future__ import annotations

import contextlib
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_checkpoints import write_drafter

from vllm_dspark.checkpoint import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptWeightsError,
    MissingShardError,
    NoWeightsError,
    SlotLayoutWarning,
    load_spec,
)
from vllm_dspark.checkpoint.headers import read_header


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before


def header_of(entries: dict[str, Any], data: bytes = b"") -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


# -- folders --


@pytest.mark.parametrize(
    ("name", "found"), [("/no/such/folder", "does not exist"), ("./nowhere", "does not exist"), ("a/b/c", "does not")]
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, found: str) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_spec(name)
    assert found in str(caught.value)
    assert "Hub id 'owner/name'" in str(caught.value)


def test_an_empty_folder_a_file_and_an_empty_name_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is empty"):
        load_spec(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match=r"weights\.bin is a file; wanted a folder"):
        load_spec(tmp_path / "weights.bin")
    with pytest.raises(CheckpointNotFoundError, match="name is empty"):
        load_spec("")


def test_a_folder_named_with_a_tilde_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_drafter(tmp_path / "drafter")
    assert load_spec("~/drafter").model == "~/drafter"


# -- config.json --


def test_a_folder_without_a_config_says_so(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"architectures": [', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'["Qwen3DSparkModel"]', "holds a JSON list"),
    ],
)
def test_a_corrupt_config_is_named_with_its_fault(tmp_path: Path, content: bytes, words: str) -> None:
    folder = write_drafter(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_spec(folder)
    assert words in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


REQUIRED = (
    "block_size mask_token_id markov_rank target_layer_ids vocab_size hidden_size num_hidden_layers "
    "num_attention_heads num_key_value_heads intermediate_size"
).split()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_or_nonsensical_value_is_named(tmp_path: Path, name: str) -> None:
    folder = write_drafter(tmp_path, drop_config={name})
    with pytest.raises(ConfigError, match=name):
        load_spec(folder)
    folder = write_drafter(tmp_path, config={name: "seven"})
    with pytest.raises(ConfigError, match=f"{name} is 'seven'.*wanted"):
        load_spec(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"block_size": 0}, "block_size is 0 in config.json; wanted an integer ≥ 1"),
        ({"markov_rank": -1}, "markov_rank is -1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"target_layer_ids": []}, r"target_layer_ids is \[\]; wanted a non-empty list"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"sample_from_anchor": "yes"}, "sample_from_anchor is 'yes'; wanted true or false"),
        ({"markov_rank": 0}, "confidence_head_with_markov is true but markov_rank is 0"),
    ],
)
def test_values_that_make_no_sense_are_shown_with_what_was_wanted(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_spec(write_drafter(tmp_path, config=config))


@pytest.mark.parametrize("name", ["transformer_layer_config", "aux_hidden_state_layer_ids"])
def test_a_speculators_config_without_its_parts_names_them(tmp_path: Path, name: str) -> None:
    folder = write_drafter(tmp_path, layout="speculators", drop_config={name})
    with pytest.raises(ConfigError, match=f"{name} is"):
        load_spec(folder)


ANY_JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@pytest.mark.parametrize("options", [{}, {"layout": "speculators"}, {"family": "gemma4"}], ids=str)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_a_config_gives_a_description_or_a_checkpoint_error(
    tmp_path: Path, options: dict[str, Any], data: st.DataObject
) -> None:
    path = tmp_path / "config.json"
    kept = tmp_path / "kept.json"
    if not kept.exists():
        write_drafter(tmp_path, **options)
        kept.write_text(path.read_text())
    config = json.loads(kept.read_text())
    part = data.draw(st.sampled_from([config] + [v for v in config.values() if isinstance(v, dict) and v]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(ANY_JSON)
    path.write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlotLayoutWarning)
        with contextlib.suppress(CheckpointError):
            assert load_spec(tmp_path).num_draft_tokens >= 1


# -- weights --


def test_a_folder_without_weights_says_what_it_found_instead(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(NoWeightsError, match=r"found no weights at all.*wanted model\.safetensors"):
        load_spec(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NoWeightsError, match=r"found pytorch_model\.bin, which must be converted"):
        load_spec(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, indexed: bool) -> None:
    folder = write_drafter(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingShardError, match=r"lacks 1 of 3 shards .*: model-00002-of-00003\.safetensors"):
        load_spec(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_corrupt_index_is_named(tmp_path: Path, content: str) -> None:
    folder = write_drafter(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors\.index\.json"):
        load_spec(folder)


DAMAGES: list[Any] = [
    pytest.param(lambda b: b"", "0 bytes", id="empty"),
    pytest.param(lambda b: b[:5], "5 bytes", id="no-header-length"),
    pytest.param(lambda b: b[:200], "announce a header of", id="cut-in-header"),
    pytest.param(lambda b: b[:-1], "truncated", id="cut-in-data"),
    pytest.param(lambda b: b + b"\0", "damaged", id="longer"),
    pytest.param(lambda b: struct.pack("<Q", 2**40) + b[8:], str(2**40), id="absurd-header-length"),
    pytest.param(lambda b: b[:8] + b"!" + b[9:], "unreadable safetensors header", id="bad-json"),
    pytest.param(lambda b: header_of({"x": {"dtype": "F32"}}), "unreadable", id="no-shape"),
    pytest.param(lambda b: header_of({"x": []}), "unreadable", id="not-an-entry"),
    pytest.param(
        lambda b: header_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        r"x of shape \[2\] and dtype F32 takes 8 bytes, not 4",
        id="shape-and-size-disagree",
    ),
    pytest.param(lambda b: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="lfs-pointer"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_weight_file_is_told_by_its_damage(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    folder = write_drafter(tmp_path)
    overwrite(folder / "model.safetensors", damage)
    with pytest.raises(CorruptWeightsError, match=words) as caught:
        load_spec(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


WHOLE = save({"a": torch.zeros(3, 2), "b": torch.zeros(1, dtype=torch.int64)}, metadata={"format": "pt"})


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_corrupt(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(WHOLE)
    assert set(read_header(path)) == {"a", "b"}
    path.write_bytes(WHOLE[:kept])
    with pytest.raises(CorruptWeightsError):
        read_header(path)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.one_of(st.binary(max_size=60), ANY_JSON.map(lambda value: json.dumps({"x": value}).encode())))
def test_any_bytes_for_a_header_are_read_or_called_corrupt(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with contextlib.suppress(CorruptWeightsError):
        assert read_header(path) == {}
