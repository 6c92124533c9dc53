"""Permuted tasks: task t sees every image with its pixels in an order of its own.

Shapes: P pixels.
"""

import numpy as np
import numpy.typing as npt

from supsup.seeding import generator


def permutation(root: int, task: int, pixels: int) -> npt.NDArray[np.int64]:
    """Return the pixel order of a task, int64 [P]: pixel ``p`` of its image is ``x[order[p]]``."""
    return generator(root, "permutation", task).permutation(pixels)


def inverse(order_P: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the permutation that undoes another."""
    return np.argsort(order_P)
