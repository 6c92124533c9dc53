"""Compiling elementwise updates to one pass, where there is a compiler."""

import logging
import subprocess
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor

from supsup.errors import SlowPath, one_line

Arguments = ParamSpec("Arguments")

# That CUDA is installed where there is no GPU is no news to anyone.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded square root. torch's own on the CPU is not: it may be one ulp off."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sqrt(x.numpy()))
    return x.sqrt()


def compiled(
    function: Callable[Arguments, None], trial: tuple[Any, ...]
) -> Callable[Arguments, None]:
    """Return a function compiled, or as it is, with a warning, where there is no compiler.

    Args:
        function: what to compile.
        trial: arguments that it is tried with; it may change them.
    """
    fast: Callable[..., None] = torch.compile(function, dynamic=True)
    try:
        fast(*trial)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        reason = one_line(error, 120)
        warnings.warn(
            f"the score update runs uncompiled, about 2 times slower: {reason}; "
            "install a C++ compiler (g++)",
            SlowPath,
            stacklevel=2,
        )
        return function
    return fast
