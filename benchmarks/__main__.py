"""Measure training and task inference; print one table and write one JSON file.

All figures are of one process with ``--threads`` threads. A figure is the median of ``--repeat``
repetitions; the range is behind it.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reference import train_task
from supsup.config import RECIPES, RunConfig, resolve, with_values
from supsup.datasets import Dataset, default_data_dir, load_dataset
from supsup.inference import TaskInference, infer
from supsup.masking import mask_bytes
from supsup.models import fixed_weights
from supsup.train import BlockTrainer, layers_of, native_bf16

REFERENCE_BATCHES = 50


def timed(work: Callable[[], object], repeat: int) -> list[float]:
    """Return the seconds of each of several runs, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def matmul_flops(dtype: torch.dtype, repeat: int) -> float:
    """Return the FLOP/s of the largest product of the training step, alone."""
    x, w = torch.randn(128, 784).to(dtype), torch.randn(300, 784).to(dtype)

    def work() -> None:
        for _ in range(200):
            x @ w.T

    return 200 * 2 * 128 * 784 * 300 / statistics.median(timed(work, repeat))


def training(config: RunConfig, data: Dataset, repeat: int) -> dict[str, list[float]]:
    """Return seconds per task of 1000 batches: this engine's, and the plain reference's."""
    trainer = BlockTrainer(with_values(config, {"train.batches": 1000}), data)
    engine = [s / 2 for s in timed(lambda: trainer.train(range(2)), repeat)]
    plain = [
        s * 1000 / REFERENCE_BATCHES
        for s in timed(lambda: train_task(config, data, 0, REFERENCE_BATCHES), repeat)
    ]
    return {"engine": engine, "plain": plain}


def decisions(config: RunConfig, data: Dataset, k: int, repeat: int) -> dict[str, list[float]]:
    """Return seconds per single-image decision among k random masks, 200 at once and alone."""
    layers = layers_of(config, data)
    random = np.random.default_rng(0)
    packed = torch.from_numpy(random.integers(0, 256, (k, mask_bytes(layers)), dtype=np.uint8))
    weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, layers)]
    engine = TaskInference(packed, weights, layers, data.classes)
    images = torch.randn(200, 1, data.pixels)
    return {
        name: [
            s / len(queries) for s in timed(lambda q=queries, m=method: infer(engine, q, m), repeat)
        ]
        for name, queries, method in (
            ("one-shot, 200 at once", images, "h-one-shot"),
            ("one-shot, alone", images[:1], "h-one-shot"),
            ("shortlist, 200 at once", images, "h-shortlist"),
        )
    }


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None)
@click.option("--threads", default=1, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--output-size", default=500, show_default=True)
@click.option("--at", default="10,100,1000", show_default=True, help="numbers of masks")
@click.option("--json", "output", default="benchmark.json", show_default=True)
def main(
    data_dir: Path | None, threads: int, repeat: int, output_size: int, at: str, output: str
) -> None:
    """Benchmark LeNet-300-100 on MNIST."""
    torch.set_num_threads(threads)
    config = resolve(RECIPES["permuted-mnist"](), device="cpu", native_bf16=native_bf16("cpu"))
    config = with_values(config, {"model.output_size": output_size})
    data = load_dataset("mnist", data_dir or default_data_dir())
    results: dict[str, list[float]] = {}
    for name, seconds in training(config, data, repeat).items():
        results[f"train, s per task of 1000 batches: {name}"] = seconds
    for k in map(int, at.split(",")):
        for name, seconds in decisions(config, data, k, repeat).items():
            results[f"decide among {k} masks, ms: {name}"] = [1000 * s for s in seconds]
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    ceiling = matmul_flops(dtype, repeat)
    _show(results, ceiling, config, repeat, threads)
    body = {
        "results": results,
        "matmul_flops": ceiling,
        "precision": config.train.precision,
        "threads": threads,
        "torch": str(torch.__version__),
        "machine": platform.processor() or platform.machine(),
    }
    Path(output).write_text(json.dumps(body, indent=1))


def _show(
    results: dict[str, list[float]], ceiling: float, config: RunConfig, repeat: int, threads: int
) -> None:
    table = Table(title=f"median of {repeat}, {threads} threads, torch {torch.__version__}")
    for column in ("what", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, values in results.items():
        row = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console = Console()
    console.print(table)
    engine, plain = (
        statistics.median(results[f"train, s per task of 1000 batches: {name}"])
        for name in ("engine", "plain")
    )
    shapes = ((784, 300), (300, 100), (100, config.model.output_size))
    # Forward, and backward to the weights and to the inputs, of which the first layer needs none.
    products = 3 * sum(a * b for a, b in shapes) - 784 * 300
    flops = 2 * 128 * 1000 * products
    console.print(
        f"the plain loop takes {plain / engine:.1f} times as long; the engine's products run at "
        f"{100 * flops / engine / ceiling:.0f} % of {ceiling / 1e9:.0f} GFLOP/s, the "
        f"{config.train.precision} product of this size alone"
    )


main()
