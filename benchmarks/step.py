"""Where the time of a training step goes: ``python -m benchmarks.step``."""

from pathlib import Path

import click
import torch
from torch.profiler import ProfilerActivity, profile

from supsup.config import RECIPES, resolve, with_values
from supsup.datasets import default_data_dir, load_dataset
from supsup.train import BlockTrainer, _Block, native_bf16


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None)
@click.option("--tasks", default=10, show_default=True)
@click.option("--steps", default=100, show_default=True)
@click.option("--output-size", default=500, show_default=True)
def main(data_dir: Path | None, tasks: int, steps: int, output_size: int) -> None:
    """Profile a block of LeNet-300-100 on MNIST, one thread; microseconds per step and task."""
    torch.set_num_threads(1)
    config = resolve(RECIPES["permuted-mnist"](), device="cpu", native_bf16=native_bf16("cpu"))
    config = with_values(config, {"model.output_size": output_size})
    block = _Block(
        BlockTrainer(config, load_dataset("mnist", data_dir or default_data_dir())), range(tasks)
    )
    for number in range(10):
        block.step(number)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in range(steps):
            block.step(number)
    spent = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in spent)
    click.echo(f"{total / steps / tasks:7.0f} all")
    for event in spent[:12]:
        click.echo(f"{event.self_cpu_time_total / steps / tasks:7.0f} {event.key}")


main()
