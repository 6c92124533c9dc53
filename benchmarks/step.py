"""Where the time of a training step goes: ``python -m benchmarks.step``."""

import time
from pathlib import Path

import click
import torch
from torch.profiler import ProfilerActivity, profile

from supsup.datasets import default_data_dir, load_dataset
from supsup.fields import with_values
from supsup.recipes import RECIPES
from supsup.train import BlockTrainer, resolve_here


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None)
@click.option("--tasks", default=10, show_default=True)
@click.option("--steps", default=100, show_default=True)
@click.option("--output-size", default=500, show_default=True)
@click.option("--engine", default="auto", show_default=True)
def main(data_dir: Path | None, tasks: int, steps: int, output_size: int, engine: str) -> None:
    """Profile a block of LeNet-300-100 on MNIST, one thread; microseconds per step and task."""
    torch.set_num_threads(1)
    values = {"model.output_size": output_size, "train.engine": engine}
    data = load_dataset("mnist", data_dir or default_data_dir())
    config = resolve_here(with_values(RECIPES["permuted-mnist"](), values), data)
    group = BlockTrainer(config, data).engine.begin(range(tasks))
    for number in range(10):
        group.step(number)
    started = time.perf_counter()
    for number in range(steps):
        group.step(number)
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in range(steps):
            group.step(number)
    spent = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    click.echo(f"{1e6 * seconds / steps / tasks:7.0f} all, of the {config.train.engine} engine")
    click.echo("        of these, operations of torch (kernels are not among them):")
    for event in spent[:12]:
        click.echo(f"{event.self_cpu_time_total / steps / tasks:7.0f} {event.key}")


main()
