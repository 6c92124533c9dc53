"""Fixed and calibrated ε over the streams of the open set: ``python -m benchmarks.streams``.

The plain loop, on one thread. The learner's decisions and masks are those of ``supsup run``.
"""

import statistics
from pathlib import Path

import click
import torch

from supsup.apprentice import LocalTrainer, MaskState
from supsup.config import RunConfig
from supsup.datasets import Dataset, default_data_dir, load_dataset
from supsup.fields import with_values
from supsup.material import layers_of
from supsup.members import LocalMembers
from supsup.models import fixed_weights
from supsup.openset import OpenSetLearner
from supsup.recipes import permuted_mnist
from supsup.streams import VISITS, Stream
from supsup.tally import Tally
from supsup.train import resolve_here

_HEADER = ("stream", "ε", "masks", "missed", "extra", "wrong", "late", "known", "new", "last ε")


def learn(config: RunConfig, data: Dataset) -> Tally:
    """Learn a stream from end to end; return what the decisions came to."""
    layers = layers_of(config, data)
    weights = [torch.from_numpy(w) for w in fixed_weights(config.seed, layers)]
    states: dict[int, MaskState | None] = {}
    members, trainer = (
        LocalMembers(layers, weights, config.openset.depth),
        LocalTrainer(config, data),
    )
    learner = OpenSetLearner(config, data, members, trainer, states.get)
    stream, tally = Stream(config, data), Tally()
    for segment in stream:
        step = learner.learn(segment)
        if step.mask is not None and step.packed_B is not None:
            states[step.mask] = step.state
        tally.add(step, stream.truth(segment.number), config.train.batch_size)
    return tally


def row(config: RunConfig, tally: Tally) -> tuple[object, ...]:
    """Return the figures of a run, in the order of the header."""
    known, new = ([d.margin for d in tally.decisions if d.known is side] for side in (True, False))
    openset, margins = config.openset, "{:.2f} ({:.2f})".format
    return (
        openset.stream,
        openset.threshold,
        tally.masks,
        tally.missed(list(range(config.tasks))),
        tally.false_new,
        tally.wrong,
        tally.late,
        margins(min(known), statistics.median(known)),
        margins(max(new), statistics.median(new)),
        f"{tally.decisions[-1].epsilon:.3f}",
    )


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None)
@click.option("--tasks", default=200, show_default=True)
@click.option("--batches", default=300, show_default=True, help="batches per task")
@click.option("--decide-every", default=30, show_default=True)
@click.option("--look", default="first", show_default=True, type=click.Choice(["first", "both"]))
@click.option("--depth", default=1, show_default=True, help="layers that decide; 0: all")
@click.option("--stream", "streams", multiple=True, type=click.Choice(list(VISITS)))
def main(
    data_dir: Path | None,
    tasks: int,
    batches: int,
    decide_every: int,
    look: str,
    depth: int,
    streams: tuple[str, ...],
) -> None:
    """Learn streams of PermutedMNIST, LeNet s = 500, with fixed and with calibrated ε.

    Prints a row for each: masks, tasks missed, masks for known tasks, decisions for another task's
    mask, decisions on tasks without one that took an existing mask; margins: the least (median) of
    known data, the most (median) of new.
    """
    torch.set_num_threads(1)
    data = load_dataset("mnist", data_dir or default_data_dir())
    print("| " + " | ".join(_HEADER) + " |\n|" + " --- |" * len(_HEADER))
    for stream in streams or tuple(VISITS):
        for threshold in ("fixed", "calibrated"):
            values = {
                "scenario": "nns", "tasks": tasks, "model.output_size": 500,
                "train.batches": batches, "openset.decide_every": decide_every,
                "openset.stream": stream, "openset.threshold": threshold,
                "openset.look": look, "openset.depth": depth,
            }  # fmt: skip
            config = resolve_here(with_values(permuted_mnist(), values), data)
            print("| " + " | ".join(map(str, row(config, learn(config, data)))) + " |", flush=True)


if __name__ == "__main__":
    main()
