"""The half of a Triton backend that names devices: there is one, and it is the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    def __init__(self) -> None: ...

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "int"

    def get_benchmarker(self) -> Callable[..., float]:
        return lambda *args, **kwargs: 0.0

    def get_empty_cache_for_benchmark(self) -> None: ...

    def clear_cache(self, cache: Any) -> None: ...
