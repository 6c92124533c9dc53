"""What a GPU does in a second, against the plain way on it: ``python -m benchmarks.gpu``.

Training is bounded by what it moves, so its speed is also given as a part of what a copy reaches.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch

from supsup import general
from supsup.datasets import Dataset, default_data_dir, load_dataset
from supsup.fields import with_values
from supsup.inference import Queries, TaskInference, infer
from supsup.masking import mask_bytes
from supsup.material import layers_of
from supsup.models import fixed_weights
from supsup.recipes import RECIPES
from supsup.train import BlockTrainer, resolve_here

#: Bytes that a step can't but move per weight: scores and mean squares are read and written, the
#: weight is read, the masked weight written and read by the next forward pass.
_BYTES_PER_WEIGHT = 4 * 4 + 3 * 2
_STEPS = 100


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Return the median time of some work, all of it done; the first time isn't counted."""
    taken = []
    for repetition in range(repeat + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if repetition:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def copy_rate(repeat: int) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeat)


def training(data: Dataset, repeat: int, rate: float) -> None:
    """Print what a step takes per task, by engine."""
    for model, size, tasks in (("lenet-300-100", 500, 250), ("fc-1024-1024", 500, 100)):
        for engine in ("fused", "dense"):
            values = {
                "model.name": model, "model.output_size": size, "train.engine": engine,
                "train.device": "cuda",
            }  # fmt: skip
            config = resolve_here(with_values(RECIPES["permuted-mnist"](), values), data)
            trainer = BlockTrainer(config, data)
            group = trainer.engine.begin(range(tasks))

            def steps(group: general.GeneralGroup = group) -> None:
                for number in range(_STEPS):
                    group.step(number)

            each = seconds(steps, repeat) / _STEPS / tasks
            weights = sum(layer.weights for layer in trainer.material.layers)
            floor = weights * _BYTES_PER_WEIGHT / rate
            print(
                f"train {model} s={size}, {tasks} tasks, {engine}: {1e6 * each:.2f} us per task "
                f"and step; a copy of its state would take {1e6 * floor:.2f}"
            )
            del group
            if model == "lenet-300-100":
                whole = seconds(lambda t=trainer, n=tasks: t.train(range(n)), 1)
                print(f"  {tasks} whole tasks of {config.train.batches} batches: {whole:.2f} s")
            torch.cuda.empty_cache()


def decisions(data: Dataset, repeat: int) -> None:
    """Print what a decision among 2500 random masks takes."""
    config = with_values(RECIPES["permuted-mnist"](), {"model.output_size": 500})
    layers, random = layers_of(config, data), np.random.default_rng(0)
    packed = torch.from_numpy(random.integers(0, 256, (2500, mask_bytes(layers)), dtype=np.uint8))
    weights = [torch.from_numpy(w) for w in fixed_weights(0, layers)]
    images = torch.from_numpy(data.test_images[:1024]).float()[:, None] / 255
    for depth in (1, 0):
        for device, count in (("cuda", 1024), ("cpu", 64)):
            memory = torch.cuda.mem_get_info()[1] // 8 if device == "cuda" else 512 << 20
            engine = TaskInference(
                packed.to(device), [w.to(device) for w in weights], layers, 10, memory, depth
            )
            asked = images[:count].to(device)
            for method in ("h-one-shot", "h-sketch", "h-shortlist"):
                taken = seconds(
                    lambda e=engine, a=asked, m=method: infer(Queries(e, a), m),
                    repeat if device == "cuda" else 1,
                )
                print(
                    f"decide {method}, depth {depth}, {device}, {count} at once: "
                    f"{1e6 * taken / count:.1f} us"
                )


@contextmanager
def told_one_by_one() -> Iterator[None]:
    """Have no step replayed."""
    kept = general.Replayed

    class Told(kept):
        def __call__(self, step: Callable[[], None]) -> None:
            step()

    general.Replayed = Told
    try:
        yield
    finally:
        general.Replayed = kept


def convolutions(repeat: int) -> None:
    """Print what a step of a conv net takes, replayed and not."""
    random = np.random.default_rng(0)
    data = Dataset(
        name="noise",
        train_images=random.integers(0, 256, (2000, 3072), dtype=np.uint8),
        train_labels=np.arange(2000) % 2,
        test_images=random.integers(0, 256, (100, 3072), dtype=np.uint8),
        test_labels=np.arange(100) % 2,
        classes=2,
        shape=(3, 32, 32),
        scale=255.0,
        mean=0.5,
        std=0.3,
        sha256="",
    )
    values = {"train.device": "cuda", "dataset": "images:noise", "tasks": 1}
    config = resolve_here(with_values(RECIPES["split-images"](), values), data)

    def timed() -> float:
        group = BlockTrainer(config, data).engine.begin(range(1))
        for number in range(10):
            group.step(number)

        def steps() -> None:
            for number in range(50):
                group.step(number)

        return seconds(steps, repeat) / 50

    with told_one_by_one():
        plain = timed()
    print(
        f"train gem-resnet18, a batch of 128: {1e3 * timed():.2f} ms replayed, {1e3 * plain:.2f} "
        "ms kernel by kernel"
    )


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None)
@click.option("--repeat", default=5, show_default=True)
def main(data_dir: Path | None, repeat: int) -> None:
    """Measure training, decisions and convolutions on this GPU."""
    data = load_dataset("mnist", data_dir or default_data_dir())
    rate = copy_rate(repeat)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {repeat}")
    print(f"copy: {rate / 1e12:.2f} TB/s, read and written")
    training(data, repeat, rate)
    decisions(data, repeat)
    convolutions(repeat)


main()
