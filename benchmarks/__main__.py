"""Speed, measured in one run against the plain way: ``make bench``.

Prints one table, and writes it as JSON and the times of decisions as a picture. A figure is the
median of ``--repeat`` repetitions; lowest and highest are beside it. What is compared takes turns:
whatever else the machine does slows all of it.
"""

import functools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.reference import train_task
from supsup.config import RunConfig
from supsup.datasets import Dataset, default_data_dir, load_dataset
from supsup.fields import with_values
from supsup.inference import Queries, TaskInference, infer
from supsup.masking import mask_bytes
from supsup.material import layers_of
from supsup.models import fixed_weights
from supsup.packed import PackedMasks
from supsup.recipes import RECIPES
from supsup.train import ENGINES, BlockTrainer, resolve_here

REFERENCE_BATCHES, ENGINE_BATCHES = 50, 200
PLAIN = "plain PyTorch loop"
Timings = dict[str, list[float]]


def timed(works: Mapping[str, Callable[[], object]], repeat: int) -> Timings:
    """Return the seconds of several runs of each, in turn, after one that is not counted."""
    seconds: Timings = {name: [] for name in works}
    for repetition in range(repeat + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def matmul_flops(dtype: torch.dtype, repeat: int) -> float:
    """Return the FLOP/s of the largest product of the training step, alone."""
    x, w = torch.randn(128, 784).to(dtype), torch.randn(300, 784).to(dtype)

    def work() -> None:
        for _ in range(200):
            x @ w.T

    return 200 * 2 * 128 * 784 * 300 / statistics.median(timed({"": work}, repeat)[""])


def step_flops(config: RunConfig, data: Dataset) -> int:
    """Return the FLOP of a dense training step of one task.

    Forward, and backward to the weights and to the inputs, of which the first layer needs none.
    """
    first, *rest = [layer.weights for layer in layers_of(config, data)]
    return 2 * config.train.batch_size * (2 * first + 3 * sum(rest))


def training(config: RunConfig, data: Dataset, repeat: int) -> Timings:
    """Return seconds per task of 1000 batches, by engine; the plain reference's last."""
    usable = [e for e in ENGINES if e in ("dense", resolve_here(config, data).train.engine)]
    works: dict[str, Callable[[], object]] = {}
    for engine in usable:
        values = {"train.engine": engine, "train.batches": ENGINE_BATCHES}
        trainer = BlockTrainer(resolve_here(with_values(config, values), data), data)
        group = trainer.engine.begin(range(10))

        def steps(group: object = group) -> None:
            for number in range(ENGINE_BATCHES):
                group.step(number)  # type: ignore[attr-defined]

        works[engine] = steps
    works[PLAIN] = lambda: train_task(config, data, 0, REFERENCE_BATCHES)
    trained = dict.fromkeys(usable, 10 * ENGINE_BATCHES) | {PLAIN: REFERENCE_BATCHES}
    return {
        name: [1000 * s / trained[name] for s in seconds]
        for name, seconds in timed(works, repeat).items()
    }


def decisions(config: RunConfig, data: Dataset, k: int, repeat: int, unpack: bool) -> Timings:
    """Return ms per single-image decision among k random masks, 256 at once and alone.

    With ``unpack``, also those of torch on unpacked masks, which do without kernels.
    """
    layers = layers_of(config, data)
    random = np.random.default_rng(0)
    packed = torch.from_numpy(random.integers(0, 256, (k, mask_bytes(layers)), dtype=np.uint8))
    weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, layers)]
    engines = {
        name: TaskInference(packed, weights, layers, data.classes, depth=depth)
        for name, depth in (("", 0), (", first layer", 1))
    }
    if unpack:
        unpacked = TaskInference(packed, weights, layers, data.classes)
        unpacked.masks = unpacked.asked = PackedMasks(packed, weights, layers)
        engines[", unpacked"] = unpacked
    pixels = torch.from_numpy(data.test_images[:256]).float()[:, None]
    images = (pixels / data.scale - data.mean) / data.std
    results: Timings = {}
    for method in ("h-one-shot", "h-sketch", "h-shortlist"):
        for name, asked in (("256 at once", images), ("alone", images[:1])):
            works = {
                f"{method}, {name}{how}": functools.partial(_decide, engine, asked, method)
                for how, engine in engines.items()
            }
            for what, seconds in timed(works, repeat).items():
                results[what] = [1000 * s / len(asked) for s in seconds]
    return results


def _decide(engine: TaskInference, images_QNP: torch.Tensor, method: str) -> None:
    infer(Queries(engine, images_QNP), method)


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None)
@click.option("--threads", default=1, show_default=True, help="threads of training")
@click.option("--decision-threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--output-size", default=500, show_default=True)
@click.option("--at", default="10,100,500,1000,2500", show_default=True, help="numbers of masks")
@click.option("--digits-at", default=25_000, show_default=True, help="masks of digits; 0: none")
@click.option("--unpack", is_flag=True, help="decide also with torch on unpacked masks")
@click.option("--json", "output", default="benchmark.json", show_default=True)
def main(
    data_dir: Path | None,
    threads: int,
    decision_threads: int,
    repeat: int,
    output_size: int,
    at: str,
    digits_at: int,
    unpack: bool,
    output: str,
) -> None:
    """Benchmark LeNet-300-100 on MNIST, and decisions among many masks of digits."""
    torch.set_num_threads(threads)
    config = with_values(RECIPES["permuted-mnist"](), {"model.output_size": output_size})
    data = load_dataset("mnist", data_dir or default_data_dir())
    results: Timings = {
        f"train, s per task of 1000 batches: {name}": seconds
        for name, seconds in training(config, data, repeat).items()
    }
    precision = resolve_here(config, data).train.precision
    ceiling = matmul_flops(torch.bfloat16 if precision == "bf16" else torch.float32, repeat)
    torch.set_num_threads(decision_threads)
    curves = {k: decisions(config, data, k, repeat, unpack) for k in map(int, at.split(","))}
    for k, timings in curves.items():
        results |= {f"decide among {k} masks, ms: {name}": t for name, t in timings.items()}
    if digits_at:
        small = with_values(RECIPES["permuted-digits"](), {"model.output_size": 100})
        digits = decisions(small, load_dataset("digits", Path()), digits_at, repeat, unpack)
        prefix = f"decide among {digits_at} masks of digits, ms: "
        results |= {prefix + name: timings for name, timings in digits.items()}
    body = {
        "results": results,
        "matmul_flops": ceiling,
        "step_flops": step_flops(config, data),
        "precision": precision,
        "threads": {"training": threads, "decisions": decision_threads},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "torch": str(torch.__version__),
        "machine": platform.processor() or platform.machine(),
    }
    Path(output).write_text(json.dumps(body, indent=1))
    _picture(curves, Path(output).with_suffix(".png"))
    _show(body, repeat)


def _show(body: dict, repeat: int) -> None:
    results: Timings = body["results"]
    table = Table(title=f"median of {repeat}, threads {body['threads']}, torch {body['torch']}")
    for column in ("what", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, values in results.items():
        row = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console = Console()
    console.print(table)
    train = {n.partition(": ")[2]: statistics.median(t) for n, t in results.items() if "train" in n}
    plain = train.pop(PLAIN)
    for engine, seconds in train.items():
        rate = 1000 * body["step_flops"] / seconds
        console.print(
            f"{engine}: {plain / seconds:.1f} times as fast as the plain loop; dense products in "
            f"that time would run at {100 * rate / body['matmul_flops']:.0f} % of "
            f"{body['matmul_flops'] / 1e9:.0f} GFLOP/s, the {body['precision']} product alone"
        )
    console.print(f"peak memory {body['peak_memory_mb']:.0f} MB")


def _picture(curves: dict[int, Timings], path: Path) -> None:
    """Draw the time of a decision against the number of masks."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(curves.values())):
        axes.plot(
            list(curves), [statistics.median(t[name]) for t in curves.values()], "o-", label=name
        )
    axes.set(xlabel="masks", ylabel="ms per decision", ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


main()
