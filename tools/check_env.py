"""Says why vLLM would not load in this environment, if it would not. Run by tools/setup.sh at its end."""

import importlib
import importlib.util
import sys

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
NEEDED = ("torch", "transformers.models.qwen3.modeling_qwen3", "vllm.entrypoints.llm")


def failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for another torch fails in many ways: OSError, RuntimeError, ...
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    for module in filter(importlib.util.find_spec, CUDA_ONLY):
        if why := failure(module):
            sys.exit(f"{module} cannot load beside this torch ({why}), and is not needed: make setup again for a clean .venv")
    for module in NEEDED:
        if why := failure(module):
            sys.exit(f"{module} cannot be imported ({why})")


if __name__ == "__main__":
    main()
