"""What a V2 runner starts with when all else is ready: step times, the policy, and its places in the runner."""

import functools
import logging
from typing import Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dspark.engine import setup, v2_costs, v2_form, v2_graphs
from vllm_dspark.engine.landing import Landing, Parcel
from vllm_dspark.engine.v2_policy import HostVerification, device_verification
from vllm_dspark.engine.v2_rounds import Rounds
from vllm_dspark.metrics import open_board
from vllm_dspark.verification.asynchronous import AsynchronousPolicy
from vllm_dspark.verification.records import PolicyOptions

logger = logging.getLogger("vllm.dspark")


def create_verification(original: Any) -> Any:
    """``maybe_create_adaptive_verification_manager`` that makes ours of vLLM's, and goes on without where vLLM refuses."""

    @functools.wraps(original)
    def wrapper(**given: Any) -> Any:
        try:
            manager = original(**given)
        except ValueError as error:
            logger.warning("lengths cannot be decided on the device (%s); they are on the host", error)
            return None
        if manager is not None and given["vllm_config"].speculative_config.method == "dspark":
            manager.__class__ = device_verification(type(manager))
        return manager

    return wrapper


def start(runner: Any) -> None:
    """Put the policy into a runner that is about to serve."""
    config, speculator = runner.vllm_config, runner.speculator
    chosen = v2_form.form(config)
    if chosen.kind == "fixed":
        return
    on_device = runner.adaptive_verification is not None
    if not on_device and runner.rejection_sampler is not None:
        runner.rejection_sampler.enable_adaptive_verification = False  # all lengths are known on the host
    rounds = make_rounds(runner, whole=v2_form.all_or_nothing(config, on_device))
    if on_device:
        runner.adaptive_verification.rounds = rounds
        runner.adaptive_verification.warm_up()
    else:
        runner.gather_batch_req_state = v2_graphs.telling_single(runner.gather_batch_req_state)
        tail = (None,) if "num_admitted_draft_tokens" in InputBatch.__dataclass_fields__ else ()
        runner.adaptive_verification = HostVerification(rounds, runner, tail)
    speculator.rounds = rounds
    runner.add_requests = _announcing(runner.add_requests, rounds)
    runner.sample_tokens = _reporting(runner.sample_tokens, rounds)


def make_rounds(runner: Any, whole: bool) -> Rounds:
    """The policy's side of the runner."""
    config, speculator = runner.vllm_config, runner.speculator
    options = v2_form.options(config)
    group = get_tp_group() if config.parallel_config.tensor_parallel_size > 1 else None
    agree = None if group is None else functools.partial(group.broadcast_object, src=0)
    costs = v2_costs.cost(runner, options, agree or (lambda value: value)) if options.policy == "adaptive" else None
    policy = AsynchronousPolicy(
        speculator.num_speculative_steps,
        costs,
        PolicyOptions(
            policy=options.policy,
            min_tokens_per_second_per_request=options.min_tokens_per_second_per_request,
        ),
        setup.temperatures(options, speculator.draft_model_config.hf_config, speculator.num_speculative_steps),
    )
    parallel = config.parallel_config
    board = None
    if group is None or group.rank_in_group == 0:
        board = open_board(getattr(config.speculative_config, "dspark_counters", ""), parallel.data_parallel_index)
    return Rounds(
        policy, runner, Landing(runner.device), speculator.clock, agree, board, whole, always=parallel.data_parallel_size > 1
    )


def _announcing(add_requests: Any, rounds: Rounds) -> Any:
    """``add_requests`` that tells the policy what new requests ask for."""

    @functools.wraps(add_requests)
    def wrapper(scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            given = request.sampling_params
            rounds.announce(request.req_id, given.extra_args if given is not None else None)
        add_requests(scheduler_output)

    return wrapper


def _reporting(sample_tokens: Any, rounds: Rounds) -> Any:
    """``sample_tokens`` whose output says how many drafts of each request were verified, and how long nobody will draft."""

    @functools.wraps(sample_tokens)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(*args, **kwargs)
        rounds.exchange()
        if isinstance(output, AsyncModelRunnerOutput):
            kind: Any = type(output)
            output.__class__ = reported(kind)
            output.dspark_outcome, output.dspark_resting = rounds.last_outcome(), rounds.resting
        return output

    return wrapper


@functools.cache
def reported(original: Any) -> Any:
    """The runner's kind of output, with what became of the drafts."""

    class Reported(original):
        dspark_outcome: tuple[list[str], Parcel] | None
        dspark_resting: int

        def get_output(self) -> Any:
            output: Any = super().get_output()
            output.dspark_resting = self.dspark_resting
            if self.dspark_outcome is not None:
                names, outcome = self.dspark_outcome
                sampled, rejected = outcome.open()
                output.dspark_verified = dict(zip(names, (sampled + rejected - 1).clip(0).tolist(), strict=True))
            return output

    return Reported
