"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz spec|manifest|block RUNS``.

Stops after RUNS inputs, or at the first one that is neither taken nor refused in one line.
"""

import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

_READERS = ["supsup.bank", "supsup.manifest", "supsup.fields", "sweeps.spec", "tomllib"]
with atheris.instrument_imports(include=_READERS):
    from supsup.bank import Bank
    from supsup.config import RunConfig
    from supsup.datasets import load_dataset
    from supsup.fields import with_values
    from supsup.manifest import dump_manifest, make_manifest
    from supsup.train import TrainedBlock
    from tests.fuzz import targets

_VALUES = {
    "tasks": 2,
    "dataset": "digits",
    "block_size": 1,
    "model.output_size": 30,
    "train.batches": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.engine": "dense",
}
_SPEC = b"""recipe = "permuted-digits"
seeds = [0, 1]
[base]
tasks = 8
[grid]
"model.output_size" = [30, 50]
"""


def _blank(task: int, size: int) -> TrainedBlock:
    """Return a block of one task that keeps no weight."""
    return TrainedBlock(
        first=task,
        masks=np.zeros((1, size), np.uint8),
        gg_correct=np.zeros(1, np.int64),
        loss=np.zeros(1, np.float32),
        seconds=0.0,
    )


def main() -> None:
    """Fuzz one target."""
    target, runs = sys.argv[1], sys.argv[2]
    folder = Path(tempfile.mkdtemp(prefix="supsup-fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    config, data = with_values(RunConfig(), _VALUES), load_dataset("digits", folder)
    manifest = make_manifest(config, data)
    bank = Bank.create(folder / "bank", manifest)
    block = [bank.commit(_blank(task, manifest.mask_bytes)) for task in range(2)][1]
    seeds = {"spec": _SPEC, "manifest": dump_manifest(manifest), "block": block.read_bytes()}
    (corpus / "seed").write_bytes(seeds[target])
    calls = {
        "spec": lambda content: targets.spec_text(content, folder / "sweep.toml"),
        "manifest": targets.manifest_bytes,
        "block": lambda content: targets.block_bytes(content, bank, block),
    }
    call = calls[target]
    options = [f"-atheris_runs={runs}", "-timeout=20", "-max_len=16000", "-rss_limit_mb=4000"]
    atheris.Setup(["fuzz", *options, str(corpus)], lambda content: call(bytes(content)))
    atheris.Fuzz()


main()
