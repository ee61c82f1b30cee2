"""The half of a Triton backend that compiles; the interpreter never asks it to."""

from typing import Any

from triton.backends.compiler import BaseBackend

ONLY = "this backend only lets interpreted kernels run; set TRITON_INTERPRET=1"


class InterpreterBackend(BaseBackend):
    binary_ext = "none"

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter-only"

    def get_module_map(self) -> dict[str, Any]:
        return {}

    def load_dialects(self, context: Any) -> None: ...

    def parse_options(self, options: Any) -> Any:
        raise NotImplementedError(ONLY)

    def add_stages(self, stages: Any, options: Any, language: Any = None) -> Any:
        raise NotImplementedError(ONLY)
