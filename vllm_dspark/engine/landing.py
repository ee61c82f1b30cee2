"""What the device tells the host without either waiting for the other: small copies and times, read a round later."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.gpu_sync_debug import gpu_sync_allowed


class Parcel:
    """Copies on their way to the host."""

    def __init__(self, copies: Sequence[Tensor], event: Any) -> None:
        self._copies, self._event = copies, event

    def open(self) -> list[NDArray[Any]]:
        """The copies; waits if the device is not that far yet."""
        with gpu_sync_allowed():
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]


class Landing:
    """Sends tensors to the host on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, *tensors: Tensor) -> Parcel:
        """Copies of these as they are at this point of the device's work; they may be overwritten afterwards."""
        kept = [tensor.clone() for tensor in tensors]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copies = [tensor.to("cpu", non_blocking=True) for tensor in kept]
            for tensor in kept:
                tensor.record_stream(self._stream)
            event.record()
        return Parcel(copies, event)


class Clock(Protocol):
    """Marks points of the device's work."""

    def mark(self) -> Any:
        """The point that everything asked for so far reaches."""

    def seconds(self, first: Any, second: Any) -> float:
        """Time between two marks that the device has passed."""


class HostClock:
    """Where the host does the work."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first


class DeviceClock:
    """Events in the device's stream: about a microsecond each, and nobody waits for them."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second)) / 1e3


def clock(device: torch.device) -> Clock:
    """The clock for work on this device."""
    return HostClock() if device.type == "cpu" else DeviceClock()


def counts(values: Sequence[int]) -> NDArray[np.int64]:
    """As an array that may be empty."""
    return np.array(values, dtype=np.int64)
