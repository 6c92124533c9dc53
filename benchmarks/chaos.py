"""Random faults on a real run: ``python -m benchmarks.chaos --faults 20 --tasks 40``.

Runs once undisturbed and once under faults, and compares: the bank's SHA-256, every block that was
ever committed, and MLflow's metrics. Exit status 1 if anything differs, is lost or doubled.
"""

import collections
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.faults import Command, Record, disturb, drawn


def metric_points(runs_dir: Path, name: str) -> tuple[int, dict[tuple[str, int], int]]:
    """Return the number of MLflow runs of a name, and how many points each key and step has."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs_dir.resolve()}/mlflow.db")
    experiment = client.get_experiment_by_name("supsup")
    runs = [
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name
    ]
    points: collections.Counter[tuple[str, int]] = collections.Counter()
    for run in runs:
        for key in run.data.metrics:
            points.update((key, p.step) for p in client.get_metric_history(run.info.run_id, key))
    finished = sum(run.info.status == "FINISHED" for run in runs)
    return (len(runs) if finished == len(runs) else -1), dict(points)


def table(record: Record, whole_seconds: float, rows: dict[str, object]) -> str:
    """Return what happened as Markdown."""
    lines = [
        "| fault | times | seconds until the next block, median | most |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, times in sorted(record.faults.items()):
        seconds = record.recovery.get(name, [])
        middle = f"{statistics.median(seconds):.1f}" if seconds else ""
        most = f"{max(seconds):.1f}" if seconds else ""
        lines.append(f"| {name} | {times} | {middle} | {most} |")
    lines += ["", "| | |", "| --- | ---: |"]
    lines += [f"| {what} | {value} |" for what, value in rows.items()]
    both = f"{whole_seconds:.0f}, {record.seconds:.0f}"
    lines.append(f"| seconds, undisturbed and disturbed | {both} |")
    return "\n".join(lines)


@click.command()
@click.option("--faults", default=20, show_default=True)
@click.option("--tasks", default=40, show_default=True)
@click.option("--block-size", default=2, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--data-dir", default="", help="MNIST is here  [digits, without it]")
@click.option("--seed", default=0, show_default=True, help="of the faults")
@click.option("--seconds", default=3600.0, show_default=True, help="after which it has failed")
@click.option("--out", type=click.Path(path_type=Path), help="file for the figures as JSON")
@click.argument("words", nargs=-1)
def main(
    faults: int,
    tasks: int,
    block_size: int,
    workers: int,
    data_dir: str,
    seed: int,
    seconds: float,
    out: Path | None,
    words: tuple[str, ...],
) -> None:
    """Disturb a run. WORDS, behind --, are further options of supsup run."""
    recipe = ["permuted-mnist", "--data-dir", data_dir] if data_dir else ["permuted-digits"]
    folder = Path(tempfile.mkdtemp(prefix="supsup-chaos-"))
    options = [
        *recipe, "--tasks", str(tasks), "--workers", str(workers), "--block-size",
        str(block_size), "--at", f"{max(1, tasks // 2)},{tasks}", *words,
    ]  # fmt: skip
    draw = random.Random(seed)
    total = -(-tasks // block_size)
    try:
        started = time.monotonic()
        whole = Command(folder / "runs", "whole", options, folder / "whole.log")
        if whole.wait(seconds):
            sys.exit(whole.said())
        whole_seconds = time.monotonic() - started
        command = Command(folder / "runs", "disturbed", options, folder / "disturbed.log")
        record = disturb(command, drawn(faults, draw), draw, total, seconds)
        equal = whole.bank_sha256() == command.bank_sha256()
        expected = metric_points(folder / "runs", "whole")[1]
        runs, points = metric_points(folder / "runs", "disturbed")
        doubled = [key for key, count in points.items() if count > 1]
        # How fast a command trained is its own affair; one that only evaluates can't tell.
        missing = [
            key for key in expected.keys() - points.keys() if not key[0].startswith("train/")
        ]
        rows: dict[str, object] = {
            "faults": sum(record.faults.values()),
            "commands (first, and resumes)": record.commands,
            "jobs tried again within a command": command.tried_again(),
            "bank equal": equal,
            "blocks lost or changed": len(command.lost()),
            "MLflow runs, FINISHED": runs,
            "metric points missing": len(missing),
            "metric points double": len(doubled),
        }
        print(table(record, whole_seconds, rows))
        print(
            f"\n{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.0f}; "
            f"seed {seed}; supsup run {options[0]}, {workers} workers, blocks of {block_size}"
        )
        if out:
            body = {**rows, "kinds": record.faults, "recovery": record.recovery}
            out.write_text(json.dumps(body, indent=1))
        bad = not equal or command.lost() or runs != 1 or doubled or missing
        if bad:
            print(command.said()[-3000:], file=sys.stderr)
        sys.exit(bool(bad))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
