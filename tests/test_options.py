"""The options: what is accepted, what is refused and how it is said, and how they get from the user to every process."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_dspark.engine import pair, patches
from vllm_dspark.options import KEY, DSparkOptions, RequestOptions, merge

SPEC = object()  # what the pair check returns; passed on, never looked into
TARGET = SimpleNamespace(model="tiny/target")


# -- the model --


def test_no_options_are_the_defaults():
    assert DSparkOptions.parse(None) == DSparkOptions.parse({}) == DSparkOptions()
    assert DSparkOptions().policy == "adaptive"
    assert DSparkOptions().sample_from_anchor is None


def test_every_option_has_a_meaning_and_a_default():
    for name, field in DSparkOptions.model_fields.items():
        assert field.description, f"{name} has no description"
        assert not field.is_required(), f"{name} must be given"


def test_lists_without_candidates_are_refused_with_both_names():
    assert DSparkOptions.parse({"candidates": 256, "listed_candidates": 32}).listed_candidates == 32
    with pytest.raises(ValueError, match="dspark options: listed_candidates = 32 needs candidates, which is unset"):
        DSparkOptions.parse({"listed_candidates": 32})


def test_options_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        DSparkOptions().policy = "fixed"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("polcy", "policy"),
        ("Policy", "policy"),
        ("policies", "policy"),
        ("sample_from_anchors", "sample_from_anchor"),
        ("sample-from-anchor", "sample_from_anchor"),
        ("anchor", "sample_from_anchor"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=rf"unknown dspark option '{name}'; did you mean '{nearest}'\?"):
        DSparkOptions.parse({name: True})


def test_an_unknown_option_like_no_other_is_refused_with_all_names():
    with pytest.raises(ValueError, match="unknown dspark option 'zzz'; valid options: ") as refused:
        DSparkOptions.parse({"zzz": 1})
    assert all(name in str(refused.value) for name in DSparkOptions.model_fields)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match="polcy") as refused:
        DSparkOptions.parse({"polcy": 1, "sample_from_anchor": "perhaps"})
    assert "'sample_from_anchor'" in str(refused.value)
    assert "'perhaps'" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "sometimes"),
        ("policy", 7),
        ("policy", None),
        ("sample_from_anchor", "perhaps"),
        ("sample_from_anchor", [1]),
        ("min_tokens_per_second_per_request", 0),
        ("profile_seconds", -1),
        ("sequential_stage", "fast"),
        ("w2_format", "int4"),
        ("draft_lm_head", True),
        ("candidates", 0),
        ("listed_candidates", -1),
    ],
)
def test_a_wrong_value_is_refused_with_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"dspark option '{name}': ") as refused:
        DSparkOptions.parse({name: value})
    assert f"found {value!r}" in str(refused.value)


@pytest.mark.parametrize("values", ["fixed", ["policy"], 3, True, False, 0, "", []], ids=repr)
def test_options_that_are_no_mapping_are_refused_with_what_was_found(values):
    """Among them ``"dspark": false``, which would otherwise look like a switch that does nothing."""
    with pytest.raises(ValueError, match="must be a mapping of names to values") as refused:
        DSparkOptions.parse(values)
    assert f"found {values!r}" in str(refused.value)


# -- of one request --


def test_a_request_sets_its_own_and_others_keys_are_left_alone():
    given = {"dspark_max_draft_tokens": 3, "dspark_policy": "fixed", "kv_transfer_params": {"x": 1}}
    assert RequestOptions.of(given) == RequestOptions(dspark_max_draft_tokens=3, dspark_policy="fixed")
    assert RequestOptions.of(None) == RequestOptions.of({}) == RequestOptions.of({"x": 1}) == RequestOptions()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dspark_max_draft_tokens": -1}, "found -1"),
        ({"dspark_max_draft_tokens": "many"}, "found 'many'"),
        ({"dspark_max_draft_tokens": 1.5}, r"found 1\.5"),
        ({"dspark_policy": "sometimes"}, "found 'sometimes'"),
        ({"dspark_max_drafts": 1}, "did you mean 'dspark_max_draft_tokens'"),
    ],
)
def test_a_requests_bad_values_are_refused_by_name(given, says):
    with pytest.raises(ValueError, match=says):
        RequestOptions.of(given)


@pytest.mark.parametrize(("method", "refused"), [("dspark", True), ("ngram", False), (None, False)])
def test_requests_are_checked_only_where_a_drafter_listens(method, refused):
    calls = []

    def original(self, model_config, speculative_config):
        calls.append(self)

    verify = patches.verify_sampling_params(original)
    parameters = SimpleNamespace(extra_args={"dspark_policy": "sometimes"})
    config = None if method is None else SimpleNamespace(method=method)
    if refused:
        with pytest.raises(ValueError, match="found 'sometimes'") as raised:
            verify(parameters, None, config)
        assert isinstance(raised.value, pytest.importorskip("vllm.exceptions").VLLMClientError)  # 400 from the server
        assert not calls
    else:
        verify(parameters, None, config)
        assert calls == [parameters]


# -- two places --


@pytest.mark.parametrize(
    ("speculative", "additional", "merged"),
    [
        (None, None, {}),
        ({"policy": "fixed"}, None, {"policy": "fixed"}),
        (None, {"policy": "fixed"}, {"policy": "fixed"}),
        ({"policy": "fixed"}, {"sample_from_anchor": False}, {"policy": "fixed", "sample_from_anchor": False}),
        ({"sample_from_anchor": True}, {"sample_from_anchor": True}, {"sample_from_anchor": True}),
    ],
)
def test_both_places_are_read_as_one(speculative, additional, merged):
    assert merge(speculative, additional) == merged


def test_a_conflict_names_the_option_both_values_and_both_places():
    with pytest.raises(ValueError, match="'sample_from_anchor' is True in speculative_config and False in additional_config"):
        merge({"sample_from_anchor": True}, {"sample_from_anchor": False})


@pytest.mark.parametrize("place", [0, 1])
def test_an_unknown_option_is_refused_in_either_place(place):
    values: list[Any] = [None, None]
    values[place] = {"polcy": "fixed"}
    with pytest.raises(ValueError, match="did you mean 'policy'"):
        merge(*values)


# -- on the way through vLLM's EngineArgs --


class Arguments:
    """The part of EngineArgs that the replacement reads; ``create`` stands for vLLM's own method."""

    def __init__(self, speculative: Any = None, additional: Any = None, **flags: Any) -> None:
        self.speculative_config = speculative
        self.additional_config = {} if additional is None else additional
        self.spec_method = self.spec_model = self.spec_tokens = None
        vars(self).update(flags)
        self.recognises = "draft_model"  # what vLLM takes a draft model for when no method is named
        self.seen: dict[str, Any] | None = None

    def create(self, target_model_config: Any, target_parallel_config: Any) -> Any:
        flags = {"method": self.spec_method, "model": self.spec_model, "num_speculative_tokens": self.spec_tokens}
        given = {**(self.speculative_config or {}), **{name: value for name, value in flags.items() if value is not None}}
        self.seen = {name.replace("-", "_"): value for name, value in given.items()}
        assert (target_model_config, target_parallel_config) == (TARGET, "parallel")
        if not given:
            return None
        return SimpleNamespace(**{"method": self.recognises, **self.seen})


@pytest.fixture
def checked(monkeypatch) -> list[Any]:
    """What the pair check was called with; and the configs that the description was written onto."""
    calls: list[Any] = []
    monkeypatch.setattr(pair, "check", lambda *call: calls.append(call) or SPEC)
    monkeypatch.setattr(pair, "complete", lambda config, spec: setattr(config, "completed", spec))
    return calls


def create(arguments: Arguments) -> Any:
    return patches.create_speculative_config(Arguments.create)(arguments, TARGET, target_parallel_config="parallel")


DRAFT = {"method": "dspark", "model": "tiny/draft", "num_speculative_tokens": 4}


def test_options_are_lifted_out_before_vllm_sees_them(checked):
    given = {**DRAFT, KEY: {"sample_from_anchor": False}}
    arguments = Arguments(given, {"other": 1})
    config = create(arguments)
    assert arguments.seen == DRAFT
    assert arguments.additional_config == {"other": 1, KEY: {"sample_from_anchor": False}}
    assert config.completed is SPEC
    assert checked == [(DRAFT, TARGET, DSparkOptions(sample_from_anchor=False))]
    assert given == {**DRAFT, KEY: {"sample_from_anchor": False}}, "the caller's own dict was changed"


def test_what_is_lifted_can_travel_to_other_processes(checked):
    arguments = Arguments({**DRAFT, KEY: {"sample_from_anchor": False}})
    create(arguments)
    travelled = json.loads(json.dumps(arguments.additional_config))  # vLLM hashes it as JSON
    assert DSparkOptions.parse(travelled[KEY]) == DSparkOptions(sample_from_anchor=False)


def test_lifting_leaves_the_additional_config_of_others_alone(checked):
    """It may be a default that several EngineArgs share."""
    shared = {"other": 1}
    create(Arguments({**DRAFT, KEY: {"policy": "fixed"}}, shared))
    assert shared == {"other": 1}


@pytest.mark.parametrize(
    ("speculative", "additional"),
    [
        ({"sample_from_anchor": True}, None),
        (None, {"sample_from_anchor": True}),
        ({"policy": "fixed"}, {"sample_from_anchor": True}),
        ({"sample_from_anchor": True}, {"sample_from_anchor": True}),
    ],
)
def test_options_reach_the_pair_check_from_either_place(checked, speculative, additional):
    create(
        Arguments(
            DRAFT if speculative is None else {**DRAFT, KEY: speculative},
            None if additional is None else {KEY: additional},
        )
    )
    ((_, _, chosen),) = checked
    assert chosen.sample_from_anchor is True


@pytest.mark.parametrize(
    ("speculative", "additional", "message"),
    [
        ({**DRAFT, KEY: {"polcy": 1}}, None, "did you mean 'policy'"),
        (DRAFT, {KEY: {"polcy": 1}}, "did you mean 'policy'"),
        ({**DRAFT, KEY: {"policy": "best"}}, None, "found 'best'"),
        ({**DRAFT, KEY: False}, None, "found False"),
        (DRAFT, {KEY: "fixed"}, "found 'fixed'"),
        (
            {**DRAFT, KEY: {"sample_from_anchor": True}},
            {KEY: {"sample_from_anchor": False}},
            "is True in speculative_config and False in additional_config",
        ),
        ({"method": "eagle", "model": "e", KEY: {"policy": "fixed"}}, None, "the speculative method is 'eagle'"),
        ({"method": "eagle", "model": "e"}, {KEY: {"policy": "fixed"}}, "the speculative method is 'eagle'"),
        (None, {KEY: {"policy": "fixed"}}, "the speculative method is None"),
    ],
)
def test_wrong_options_are_refused_before_vllm_or_the_checkpoint_is_asked(checked, speculative, additional, message):
    arguments = Arguments(speculative, additional)
    with pytest.raises(ValueError, match=message):
        create(arguments)
    assert arguments.seen is None
    assert checked == []


def test_a_pair_that_does_not_fit_is_refused_before_vllm_builds_its_config(monkeypatch):
    def refuse(*_: Any) -> None:
        raise ValueError("does not fit")

    monkeypatch.setattr(pair, "check", refuse)
    arguments = Arguments(DRAFT)
    with pytest.raises(ValueError, match="does not fit"):
        create(arguments)
    assert arguments.seen is None


@pytest.mark.parametrize(
    "arguments",
    [
        Arguments(spec_method="dspark", spec_model="tiny/draft", spec_tokens=4),
        Arguments({"model": "tiny/draft", "num_speculative_tokens": 4}, spec_method="dspark"),
        Arguments({"method": "dspark", "num-speculative-tokens": 4}, spec_model="tiny/draft"),
        Arguments({"method": "dspark", "model": "tiny/draft"}, {KEY: {"policy": "fixed"}}, spec_tokens=4),
    ],
    ids=["flags", "method by flag", "model by flag, dashed name", "tokens by flag"],
)
def test_the_pair_is_checked_however_the_drafter_is_named(checked, arguments):
    """vLLM has --spec-method, --spec-model and --spec-tokens, and takes dashes for underscores."""
    config = create(arguments)
    ((asked, _, _),) = checked
    assert asked == DRAFT == arguments.seen
    assert config.completed is SPEC


def test_the_pair_is_checked_when_vllm_recognises_the_method_itself(checked):
    arguments = Arguments({"model": "tiny/dspark"}, {KEY: {"sample_from_anchor": True}})
    arguments.recognises = "dspark"
    config = create(arguments)
    assert checked == [({"model": "tiny/dspark"}, TARGET, DSparkOptions(sample_from_anchor=True))]
    assert config.completed is SPEC


def test_options_are_refused_when_vllm_recognises_another_method(checked):
    arguments = Arguments({"model": "tiny/eagle"}, {KEY: {"policy": "fixed"}})
    arguments.recognises = "eagle"
    with pytest.raises(ValueError, match="the speculative method is 'eagle'"):
        create(arguments)
    assert checked == []


class Hashable:
    """vLLM takes any object with a hash for additional_config."""

    def compute_hash(self) -> str:
        return "h"


@pytest.mark.parametrize(
    ("speculative", "additional", "flags"),
    [
        (None, None, {}),
        (None, {"other": 1}, {}),
        (None, Hashable(), {}),
        ({"method": "eagle", "model": "e", "num_speculative_tokens": 2}, None, {}),
        ({"method": "ngram", "num-speculative-tokens": 2}, Hashable(), {}),
        ({"model": "tiny/llama"}, {"other": 1}, {}),
        (None, None, {"spec_method": "mtp", "spec_tokens": 1}),
    ],
)
def test_other_methods_pass_through_untouched(checked, speculative, additional, flags):
    touched, untouched = Arguments(speculative, additional, **flags), Arguments(speculative, additional, **flags)
    assert create(touched) == untouched.create(TARGET, "parallel")
    assert vars(touched) == vars(untouched)
    assert touched.speculative_config is speculative
    assert checked == []


def test_options_beside_an_additional_config_that_cannot_hold_them_are_refused(checked):
    with pytest.raises(ValueError, match="need an additional_config that is a mapping"):
        create(Arguments({**DRAFT, KEY: {"policy": "fixed"}}, Hashable()))


def test_dspark_without_options_needs_no_additional_config(checked):
    arguments = Arguments(DRAFT, Hashable())
    assert create(arguments).completed is SPEC
    assert isinstance(arguments.additional_config, Hashable)


def test_drafters_inside_the_targets_files_are_left_to_vllm(monkeypatch):
    """The check knows no description for those, and the config stays as vLLM made it."""
    monkeypatch.setattr(pair, "complete", lambda *_: pytest.fail("a config was written without a description"))
    for given in ({"method": "dspark"}, {"method": "dspark", "model": TARGET.model}):
        assert create(Arguments(given)).method == "dspark"


def test_other_methods_do_not_pay_for_the_checkpoint_reader():
    program = (
        "import sys\n"
        "from types import SimpleNamespace as Some\n"
        "from vllm_dspark.engine import patches\n"
        "arguments = Some(speculative_config={'method': 'eagle'}, additional_config={}, spec_method=None, spec_model=None,\n"
        "                 spec_tokens=None)\n"
        "patches.create_speculative_config(lambda *_: None)(arguments, None)\n"
        "print([name for name in sys.modules if name.startswith('vllm_dspark.checkpoint')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
