"""vLLM's V2 runner without a GPU: ``EngineProcess(prepare=interpreted.PREPARE)`` starts an engine on it."""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKEND = Path(__file__).resolve().parent / "triton_cpu"
PREPARE = f"{Path(__file__).stem}:install"


def install() -> None:
    """Register the backend and turn the interpreter on, here and in what this process starts. Before Triton is imported."""
    assert "triton" not in sys.modules, "Triton has looked for its backends already"
    sys.path.insert(0, str(BACKEND))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BACKEND), os.environ.get("PYTHONPATH")]))
    os.environ["TRITON_INTERPRET"] = "1"
    mend_masks()
    _mend_log1p()


def mix_slots() -> None:
    """Give vLLM 0.32's own DSpark the noise that 0.33's draws, another in every slot; ours is that on either."""
    import wrapt

    def mix(speculator: Any) -> None:
        from vllm.v1.worker.gpu.sample import gumbel

        if hasattr(gumbel, "spec_step_seed"):
            return
        original = speculator.gumbel_sample

        def mixed(logits: Any, index: Any, temperature: Any, seeds: Any, *rest: Any, logits_cache_col: Any, **more: Any) -> Any:
            seeds = seeds ^ (logits_cache_col.long() << 32)
            return original(logits, index, temperature, seeds, *rest, logits_cache_col=logits_cache_col, **more)

        speculator.gumbel_sample = mixed

    wrapt.register_post_import_hook(mix, "vllm.v1.worker.gpu.spec_decode.dspark.speculator")


def mend_masks() -> None:
    """Triton 3.9's interpreter refuses masks that came out of & as integers; vLLM's sampler has one when it keeps q."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("create_masked_load", "create_masked_store"):
        setattr(InterpreterBuilder, name, _with_boolean_mask(getattr(InterpreterBuilder, name)))


def _mend_log1p() -> None:
    """What comes from libdevice is an empty shell to the interpreter; vLLM's rejection sampler takes a logarithm from there."""
    from triton import language as tl
    from triton.language.extra import libdevice

    libdevice.log1p = lambda x: tl.log(1.0 + x)


def _with_boolean_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    place = list(inspect.signature(original).parameters).index("mask")

    def mended(*args: Any) -> Any:
        mask = args[place]
        mask.data = mask.data.astype(bool)
        return original(*args)

    return mended
