"""The fixed networks: their layers and the random weights that no training ever changes.

Shapes: O outputs of a layer, I inputs of a layer.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supsup.seeding import generator

#: Hidden units of each network (LeNet-300-100: LeCun et al. 1998; FC-1024-1024: paper, 4.2).
MODELS: dict[str, tuple[int, ...]] = {
    "lenet-300-100": (300, 100),
    "fc-1024-1024": (1024, 1024),
}


@dataclass(frozen=True)
class Layer:
    """One linear or convolutional layer without bias, as a matrix."""

    name: str
    outputs: int
    inputs: int
    """Weights of an output: fan_in."""
    kernel: tuple[int, ...] = ()
    """Input channels of a group, rows and columns of a convolution's kernel; () if linear."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights as the network has them."""
        return (self.outputs, *(self.kernel or (self.inputs,)))

    @property
    def weights(self) -> int:
        """Number of weights, and of mask bits."""
        return self.outputs * self.inputs

    @property
    def mask_bytes(self) -> int:
        """Bytes of this layer's packed mask; every layer starts on a byte."""
        return (self.weights + 7) // 8


def make_layers(model: str, pixels: int, output_size: int) -> tuple[Layer, ...]:
    """Return the layers of a network over images of that many pixels."""
    widths = (pixels, *MODELS[model], output_size)
    return tuple(
        Layer(name=f"linear{i}", outputs=outputs, inputs=inputs)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    )


def fixed_weights(root: int, layers: Sequence[Layer]) -> list[npt.NDArray[np.float32]]:
    """Return the signed Kaiming constant weights, ``±sqrt(2 / fan_in)``, one [O, I] per layer.

    They depend on the root seed, the layer's name and its shape alone (paper, Appendix C).
    """
    return [_signed_kaiming_constant(root, layer) for layer in layers]


def _signed_kaiming_constant(root: int, layer: Layer) -> npt.NDArray[np.float32]:
    stream = generator(root, "weights", layer.name, layer.outputs, layer.inputs, *layer.kernel)
    signs = stream.integers(0, 2, size=(layer.outputs, layer.inputs), dtype=np.int8)
    constant = np.float32(math.sqrt(2 / layer.inputs))
    return np.where(signs == 1, constant, -constant)


def weights_sha256(weights: Sequence[npt.NDArray[np.float32]]) -> str:
    """Return the SHA-256 over all layers, in order, as little-endian float32."""
    digest = hashlib.sha256()
    for weight_OI in weights:
        digest.update(np.ascontiguousarray(weight_OI, dtype="<f4").data)
    return digest.hexdigest()
