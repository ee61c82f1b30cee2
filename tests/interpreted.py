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
