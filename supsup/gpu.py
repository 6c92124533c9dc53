"""What GPUs need that processors don't: steps that are told once, and repeatable kernels."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from supsup.errors import SlowPath, one_line

#: Steps taken one kernel after another, before they are recorded: libraries make ready.
_WARM_STEPS = 3


@dataclass
class Recording:
    """How an engine's steps are recorded, and whether they can be."""

    allocates: bool
    """Whether a step takes memory, other than what it is given."""
    possible: bool = True


class Replayed:
    """A step that is recorded as a CUDA graph, and then repeated by a single call.

    Every number that differs between steps must lie on the device, where it always lies. What is
    repeated computes what was recorded, bit for bit. A graph must be gone before another is
    recorded: they share a stream, and what it keeps for libraries.
    """

    def __init__(self, recording: Recording) -> None:
        """Record nothing yet."""
        self._recording = recording
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Callable[[], None]) -> None:
        """Take a step, the same each time."""
        if not self._recording.possible:
            step()
            return
        if self._taken == _WARM_STEPS:
            self._graph = self._recorded(step)
        self._taken += 1
        if self._graph is not None:
            self._graph.replay()
        else:
            _aside(step)

    def _recorded(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Record a step without taking it; None if it can't be."""
        if self._recording.allocates:
            # What graphs before had for themselves is free again, but only so.
            torch.cuda.empty_cache()
        graph, stream = torch.cuda.CUDAGraph(), _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), _capture(graph):
                step()
        except RuntimeError as error:
            warnings.warn(
                "a training step can't be recorded as a CUDA graph, and is several times slower: "
                f"{one_line(error, 120)}",
                SlowPath,
                stacklevel=2,
            )
            self._recording.possible = False
            return None
        return graph


def _aside(step: Callable[[], None]) -> None:
    """Take a step on a stream of its own, as what is to be recorded must have been."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Return the stream that steps are recorded on: one, for each has memory of its own."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    graph.capture_begin()
    try:
        yield
    except BaseException:
        # What ends it says that it failed; why, the other error says.
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()


@contextmanager
def repeatable() -> Iterator[None]:
    """Have cuDNN give the same bits for the same numbers, and compute in the precision asked for.

    Without it convolutions of fp32 are multiplied in TF32, and their gradients added up in any
    order.
    """
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that tensors can have; torch keeps some of them ready."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept
