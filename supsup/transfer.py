"""Transfer: scores that start from those of the tasks before, which makes tasks a chain.

What tasks leave to those after them is a ``Legacy``: the running mean of all scores so far, the
last task's, or everybody's. Tasks are trained one after another; a legacy, kept on disk beside the
bank, is where training goes on from.

Shapes: K tasks that a legacy has scores of, W scores of all layers, end to end, S statistics of
batch norm, O outputs and I inputs of a layer.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from supsup.config import RunConfig
from supsup.files import make_folder, write_atomically
from supsup.general import GeneralGroup
from supsup.masking import make_masks, pack
from supsup.material import Material, as_tensor
from supsup.net_inference import make_inference

Floats = npt.NDArray[np.float32]
_NAME = re.compile(r"tasks-(\d{9})-(\d{9})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Legacy:
    """What the first ``learned`` tasks leave to those after them."""

    learned: int
    scores_KW: Floats
    """most-similar: every task's; previous: the last one's; running-mean: their mean, alone."""
    statistics_KS: Floats
    """most-similar: every task's, of no width without batch norm; else of no width."""


def chained(config: RunConfig) -> bool:
    """Say whether a task's scores start from those of the tasks before."""
    return config.mask.transfer != "none"


def inherited(material: Material, legacy: Legacy | None, task: int) -> list[Tensor] | None:
    """Return the scores [1, O, I] per layer that a task starts from; None: the random ones.

    Raises:
        ValueError: if the legacy is not that of the tasks just before.
    """
    if (legacy.learned if legacy else 0) != task:
        raise ValueError(f"task {task} needs the legacy of the {task} tasks before it")
    if legacy is None:
        return None
    similar = material.config.mask.transfer == "most-similar"
    chosen = most_similar(material, legacy, task) if similar else 0
    return _by_layer(material, legacy.scores_KW[chosen : chosen + 1])


def most_similar(material: Material, legacy: Legacy, task: int) -> int:
    """Return the earlier task that one-shot by entropy finds in a task's first training batch.

    By torch alone: what kernels this machine has must shape no mask.
    """
    config, data = material.config, material.data
    scores = _by_layer(material, legacy.scores_KW)
    packed = torch.from_numpy(pack(make_masks(config.mask, material.layers, scores)))
    classes = material.family.classes
    engine = make_inference(
        config, data, packed, material.weights, material.layers, classes,
        statistics_TS=legacy.statistics_KS, kernels=False,
    )  # fmt: skip
    images, labels = material.family.train(task)
    chosen_B = material.batches(len(labels))[0]
    images_BP = material.normalised(as_tensor(images[chosen_B])).float()
    return int(engine.alpha_gradients(images_BP[None], "h").argmin())


def handed_on(config: RunConfig, legacy: Legacy | None, group: GeneralGroup) -> Legacy:
    """Return what is left once one more task is trained."""
    own = torch.cat([part.flatten() for part in group.scores()]).cpu().numpy()[None]
    learned = legacy.learned + 1 if legacy else 1
    statistics = np.empty((1, 0), np.float32)
    if config.mask.transfer == "running-mean" and legacy:
        own = legacy.scores_KW + (own - legacy.scores_KW) / np.float32(learned)
    if config.mask.transfer == "most-similar":
        found = group.statistics()
        statistics = statistics if found is None else found
        if legacy:
            own = np.concatenate([legacy.scores_KW, own])
            statistics = np.concatenate([legacy.statistics_KS, statistics])
    return Legacy(learned=learned, scores_KW=own, statistics_KS=statistics)


def _by_layer(material: Material, scores_KW: Floats) -> list[Tensor]:
    sizes = [layer.weights for layer in material.layers]
    parts = torch.split(as_tensor(scores_KW), sizes, dim=1)
    return [
        part.reshape(-1, layer.outputs, layer.inputs)
        for part, layer in zip(parts, material.layers, strict=True)
    ]


# --- on disk -----------------------------------------------------------------------------------


class LegacyStore:
    """Legacies of a run's blocks, one file each; that of a block is written before its commit."""

    def __init__(self, folder: Path, config: RunConfig, fingerprint: str) -> None:
        """Use a folder, which need not be there yet.

        Args:
            folder: where the files are.
            config: the configuration of the run.
            fingerprint: the training fingerprint of its bank.
        """
        self._folder, self._fingerprint = folder, fingerprint
        self._all = config.mask.transfer == "most-similar"

    def save(self, block: range, legacy: Legacy) -> None:
        """Keep what is left once a block is trained. When this returns, it survives a power cut.

        Where every task's scores are kept, the file has those of the block.
        """
        make_folder(self._folder)
        part = slice(block.start, block.stop) if self._all else slice(None)
        tensors = {
            "scores": np.ascontiguousarray(legacy.scores_KW[part]),
            "statistics": np.ascontiguousarray(legacy.statistics_KS[part]),
        }
        header = {"bank": self._fingerprint, "crc32": _crc32(tensors)}
        content = safetensors.numpy.save(tensors, metadata={"supsup": json.dumps(header)})
        write_atomically(self._path(block), content)

    def forget(self, block: range) -> None:
        """Remove what no task needs any more now that a block is committed."""
        if self._all:
            return
        for tasks, path in self._files():
            if tasks.stop < block.stop:
                path.unlink()

    def load(self, learned: int) -> Legacy | None:
        """Return what the first tasks leave; None if there are none, or it can't be trusted."""
        wanted = [(tasks, path) for tasks, path in self._files() if tasks.stop <= learned]
        if not self._all:
            wanted = [pair for pair in wanted if pair[0].stop == learned][-1:]
        parts = [_read(path, self._fingerprint) for _, path in wanted]
        found = [part for part in parts if part is not None]
        if len(found) < len(wanted) or not _adjoin(
            [tasks for tasks, _ in wanted], learned, self._all
        ):
            return None
        return Legacy(
            learned=learned,
            scores_KW=np.concatenate([part["scores"] for part in found]),
            statistics_KS=np.concatenate([part["statistics"] for part in found]),
        )

    def newest(self, blocks: Sequence[range]) -> Legacy | None:
        """Return what the most of the tasks leave, of those in blocks from task 0 on."""
        stops, end = [], 0
        for block in blocks:
            if block.start != end:
                break
            end = block.stop
            stops.append(end)
        legacies = (self.load(stop) for stop in reversed(stops))
        return next((legacy for legacy in legacies if legacy), None)

    def _files(self) -> list[tuple[range, Path]]:
        names = [(_NAME.fullmatch(path.name), path) for path in self._folder.glob("*.safetensors")]
        found = [(range(int(m[1]), int(m[2]) + 1), path) for m, path in names if m]
        return sorted(found, key=lambda item: item[0].start)

    def _path(self, block: range) -> Path:
        return self._folder / f"tasks-{block.start:09d}-{block[-1]:09d}.safetensors"


def _adjoin(blocks: Sequence[range], learned: int, from_start: bool) -> bool:
    """Say whether blocks end at ``learned``, and follow each other from task 0 on if they must."""
    if not blocks or blocks[-1].stop != learned:
        return False
    starts = [0, *(block.stop for block in blocks[:-1])]
    return not from_start or starts == [block.start for block in blocks]


def _read(path: Path, fingerprint: str) -> dict[str, Floats] | None:
    """Return the tensors of a file; None if it is damaged or another bank's."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("supsup", "{}"))
            tensors = {name: file.get_tensor(name) for name in ("scores", "statistics")}
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError, TypeError):
        return None
    expected = {"bank": fingerprint, "crc32": _crc32(tensors)}
    return tensors if header == expected else None


def _crc32(tensors: dict[str, Floats]) -> int:
    return zlib.crc32(tensors["statistics"].tobytes(), zlib.crc32(tensors["scores"].tobytes()))
