"""What machines can do, asked in a process of its own: whatever hangs there can be ended.

The heavy modules load here, so that ``supsup doctor`` itself can look at other things meanwhile.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supsup.datasets import default_data_dir

#: Seconds in which every node of a cluster must have answered.
NODE_SECONDS = 60.0
#: Seconds in which a machine's own tools must answer.
_TOOL_SECONDS = 10.0
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
#: The files that a data set is, by patterns; without them it would be downloaded.
_FILES = {
    "mnist": [f"MNIST/raw/{part}-ubyte*" for part in _IDX],
    "fashion-mnist": [f"FashionMNIST/raw/{part}-ubyte*" for part in _IDX],
    "cifar10": [f"cifar-10-batches-py/{part}_batch*" for part in ("data", "test")],
    "cifar100": [f"cifar-100-python/{part}" for part in ("train", "test")],
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one machine is."""

    host: str
    python: str
    versions: dict[str, str]
    cores: int
    device: str
    gpus: list[str]
    driver: str
    """NVIDIA's driver; empty if there is none."""
    native_bf16: bool
    sparse: list[str]
    """Precisions in which the sparse engine can be had."""
    fused: bool
    """Whether the fused engine can be had."""
    lookup: bool
    """Whether task inference has compiled kernels."""
    instructions: list[str]
    compiler: str
    warnings: list[str]
    data: dict[str, str]
    """SHA-256 by data set; "absent", or why it can't be read."""


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """What a cluster is."""

    address: str
    resources: dict[str, float]
    elastic: bool
    """Whether an autoscaler adds nodes when they are asked for."""
    nodes: list[Node] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Nodes that didn't answer, and why."""


def this_node(names: list[str], data_dir: str) -> Node:
    """Say what this machine is, and which of some data sets it has."""
    import ray
    import torch

    import supsup
    from orchestrator.cluster import this_machine
    from supsup.packed import lookup_kernels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        machine = this_machine()
        lookup = lookup_kernels() is not None
    able = torch.cpu.get_capabilities()
    gpus = torch.cuda.device_count()
    return Node(
        host=socket.gethostname(),
        python=platform.python_version(),
        versions={"ray": ray.__version__, "torch": str(torch.__version__)}
        | {"supsup": supsup.__version__},
        cores=len(os.sched_getaffinity(0)),
        device=machine.device,
        gpus=[torch.cuda.get_device_name(i) for i in range(gpus)],
        driver=_driver(),
        native_bf16=machine.native_bf16,
        sparse=list(machine.sparse_precisions),
        fused=machine.fused,
        lookup=lookup,
        instructions=[x for x in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(x)],
        compiler=shutil.which(os.environ.get("CXX") or "g++") or "",
        warnings=[str(one.message) for one in caught],
        data={name: _data(name, data_dir) for name in names},
    )


def _driver() -> str:
    """Return the version of NVIDIA's driver; empty if there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.partition("\n")[0].strip()


def _data(name: str, data_dir: str) -> str:
    """Return a data set's SHA-256, "absent", or why it can't be read. Downloads nothing."""
    from supsup.datasets import load_dataset
    from supsup.errors import UserError

    folder = Path(data_dir) if data_dir else default_data_dir()
    lacking = [pattern for pattern in _FILES.get(name, ()) if not any(folder.glob(pattern))]
    if lacking:
        whole = len(lacking) == len(_FILES[name])
        return "absent" if whole else f"incomplete: {folder} lacks {lacking[0]}"
    try:
        return load_dataset(name, folder).sha256
    except UserError as error:
        return str(error)


def cluster(address: str, names: list[str], data_dir: str) -> Clustered:
    """Ask every node of a cluster what it is.

    Raises:
        UserError: if it can't be reached.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.cluster import is_elastic, joined, last_line

    with joined(address) as place:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        # Their processes end with them, which would keep some of a GPU's memory.
        ask: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(this_node)
        asked = {}
        for node in alive:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = ask.options(scheduling_strategy=here).remote(names, data_dir)
            asked[answer] = node["NodeManagerAddress"]
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        nodes, problems = [], [f"{asked[ref]}: no answer in {NODE_SECONDS:.0f} s" for ref in late]
        for ref in ready:
            try:
                nodes.append(ray.get(ref))
            # Whatever a node lacks, from the package to its memory, is what is asked here.
            except Exception as error:  # noqa: BLE001
                problems.append(f"{asked[ref]}: {last_line(error)}")
        return Clustered(
            address=place,
            resources=resources,
            elastic=is_elastic(),
            nodes=nodes,
            problems=problems,
        )


def main() -> None:
    """Answer one question, JSON on standard input, as JSON on standard output."""
    from supsup.errors import UserError

    question: dict[str, Any] = json.load(sys.stdin)
    answers = os.dup(1)
    # What libraries print is no answer.
    os.dup2(2, 1)
    address = question.pop("address")
    try:
        found = cluster(address, **question) if address else this_node(**question)
        answer: dict[str, Any] = {"found": dataclasses.asdict(found)}
    except UserError as error:
        answer = {"error": str(error)}
    with contextlib.suppress(BrokenPipeError), os.fdopen(answers, "w") as out:
        json.dump(answer, out)


if __name__ == "__main__":
    main()
