"""Random streams, each derived from one root seed by name, so that none depends on another.

The names in use: ``weights``, ``scores``, ``permutation``, ``order``, ``class order`` (tasks and
their training); ``trunk``, ``own weights``, ``factors``, ``rotation`` (baselines); ``stream
order``, ``stream lengths``, ``stream visits``, ``stream fades`` (the open set); ``evaluation``
(images), ``evaluation tasks``; ``digits split``, ``images order`` (data sets).
"""

import hashlib
import json

import numpy as np


def derive_seed(root: int, *names: str | int) -> int:
    """Return a 64-bit seed for the stream of that name under the root seed.

    The names are encoded as JSON before hashing, so ``("a", 1)``, ``("a", "1")`` and ``("a1",)``
    are three different streams.
    """
    text = json.dumps([root, *names], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def generator(root: int, *names: str | int) -> np.random.Generator:
    """Return a fresh generator at the start of the named stream."""
    return np.random.Generator(np.random.PCG64(derive_seed(root, *names)))
