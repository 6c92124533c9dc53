"""What ``supsup doctor`` says: what this machine and a cluster can and can't do, and the remedy.

Whatever may hang, a driver, a cluster or a server, is asked with a deadline, in a process of its
own or by a socket with a timeout.
"""

import concurrent.futures
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import surroundings
from orchestrator.finding import Finding, Level
from orchestrator.probe import NODE_SECONDS, Clustered, Node

#: Seconds that this machine may take to say what it is; kernels are compiled at first.
_MACHINE_SECONDS = 120.0
_SHARED_MEMORY = 1e9
#: Data sets that don't come with the installation.
DOWNLOADED = ("mnist", "fashion-mnist", "cifar10", "cifar100")
#: SHA-256 of the data sets as they were published: shapes, pixels and labels.
KNOWN = {
    "digits": "e044da2edb43d1646badfe4964bfd650cdbd3c99e8b5ec7db0facd6eebede05d",
    "digits-16": "f686bba0c8a3e20a460f4c83d1c8a2e6c09a055cca0b986a66b0e974674a56fc",
    "mnist": "2bf3e0801329bc557165b70053b0419563d8bb260c47919f3429524f80f5c8ac",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the doctor is asked about."""

    runs_dir: Path
    data_dir: str
    dataset: str | None
    """The data set that must be there; None: whichever is there must be right."""
    address: str | None
    tracking_uri: str | None


def examine(question: Question) -> list[Finding]:
    """Look at everything; takes a few seconds, and starts no cluster."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        here = pool.submit(_ask, question, None, _MACHINE_SECONDS)
        seconds = _MACHINE_SECONDS + NODE_SECONDS
        there = pool.submit(_ask, question, question.address, seconds) if question.address else None
        store = pool.submit(surroundings.mlflow_store, question.tracking_uri, question.runs_dir)
        findings = [
            *surroundings.versions(
                _lock(),
                importlib.metadata.requires("supsup") or [],
                surroundings.installed_versions(),
            ),
            surroundings.token(os.environ, Path.home(), question.address is not None),
            *surroundings.runs_folder(question.runs_dir),
            *_memory(),
            *surroundings.ports(surroundings.listeners()),
            *store.result(),
        ]
        node = here.result()
        if isinstance(node, Finding):
            return [node, *findings]
        known = Node(**node)
        findings = [*machine(known), *findings, *data(known, question.dataset)]
        if there is not None:
            cluster = there.result()
            if isinstance(cluster, Finding):
                return [*findings, cluster]
            nodes = [Node(**one) for one in cluster.pop("nodes")]
            findings += clustered(Clustered(**cluster, nodes=nodes), known)
        return findings


def _ask(question: Question, address: str | None, seconds: float) -> dict[str, Any] | Finding:
    """Ask in a process of its own; return what it found, or why it couldn't."""
    names = [question.dataset] if question.dataset else list(DOWNLOADED)
    asked = {"address": address, "names": names, "data_dir": question.data_dir}
    what = "cluster" if address else "machine"
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from orchestrator.probe import main; main()"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Finding(
            "fail", what, f"no answer in {seconds:.0f} s", "see nvidia-smi, or ray status"
        )
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding("fail", what, last[:200], "mend the installation: make env")
    if "error" in answer:
        return Finding("fail", what, answer["error"])
    found: dict[str, Any] = answer["found"]
    return found


def _lock() -> Sequence[str]:
    """Return the lines of the lock file; none in an installation without one."""
    path = Path(__file__).parents[1] / "requirements.lock"
    return path.read_text().splitlines() if path.exists() else []


def _memory() -> list[Finding]:
    """Look at the shared memory that Ray's object store lies in."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return []
    free = shutil.disk_usage(shared).free
    value = f"{shared}: {free / 1e9:.1f} GB free"
    if free < _SHARED_MEMORY:
        remedy = "Ray would keep data on disk; in a container, give --shm-size=2g"
        return [Finding("warn", "shared memory", value, remedy)]
    return [Finding("ok", "shared memory", value)]


# --- machines ----------------------------------------------------------------------------------


def machine(node: Node) -> list[Finding]:
    """Say what a machine computes on, and what makes it slow."""
    findings = [
        Finding("ok", "python", node.python),
        Finding("ok", "processor", f"{node.cores} cores, {' '.join(node.instructions) or 'plain'}"),
        _gpu(node),
        Finding("ok", "engine", engine(node)),
    ]
    if node.device == "cuda" and not node.fused:
        remedy = "install gcc and Triton, for GPUs of compute capability 8.0: training gets faster"
        findings.append(Finding("warn", "fused engine", "can't be had", remedy))
    if not node.compiler:
        remedy = "install g++: training gets about twice as fast, task inference many times"
        findings.append(Finding("warn", "compiler", "no C++ compiler", remedy))
    elif not node.lookup and "avx2" in node.instructions:
        said = node.warnings[0] if node.warnings else f"{node.compiler} compiles no kernels"
        findings.append(Finding("warn", "compiler", said, "mend it, or set $CXX to another"))
    else:
        findings.append(Finding("ok", "compiler", node.compiler))
    return findings


def _gpu(node: Node) -> Finding:
    if node.gpus:
        kinds = ", ".join(f"{node.gpus.count(name)} x {name}" for name in sorted(set(node.gpus)))
        return Finding("ok", "GPU", f"{kinds}, driver {node.driver or 'unknown'}")
    if node.driver:
        remedy = f"torch {node.versions['torch']} can't use it: update the driver"
        return Finding("warn", "GPU", f"driver {node.driver}", remedy)
    return Finding("ok", "GPU", "none: training runs on the cores")


def engine(node: Node) -> str:
    """Say which engine trains on a machine where the configuration leaves it open."""
    precision = "bf16" if node.native_bf16 else "fp32"
    if node.device == "cuda":
        kind = "fused" if node.fused else "dense"
        return f"{kind}, {precision}, on the GPU"
    if precision in node.sparse:
        return f"sparse, {precision}, where most pixels are background, as MNIST's; else dense"
    return f"dense, {precision}"


# --- data --------------------------------------------------------------------------------------


def data(node: Node, required: str | None) -> list[Finding]:
    """Say which data sets a machine has, and whether they are what they should be."""
    return [_data(name, found, required) for name, found in node.data.items()]


def _data(name: str, found: str, required: str | None) -> Finding:
    what = f"data: {name}"
    if found == "absent":
        if name == required:
            return Finding(
                "fail", what, "absent", "put its files into --data-dir (docs/cluster.md)"
            )
        return Finding("ok", what, "absent; downloaded on first use")
    if not _is_hash(found):
        level: Level = "fail" if name == required or not found.startswith("incomplete") else "warn"
        return Finding(level, what, found, "fetch its files again")
    if found != KNOWN.get(name, found):
        value = f"SHA-256 {found[:16]}, must be {KNOWN[name][:16]}"
        return Finding("fail", what, value, "fetch its files again")
    known = "" if name in KNOWN else " (no published one to compare with)"
    return Finding("ok", what, f"SHA-256 {found[:16]}{known}")


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


# --- clusters ----------------------------------------------------------------------------------


def clustered(cluster: Clustered, here: Node) -> list[Finding]:
    """Say what a cluster offers, and what its nodes lack that this machine has."""
    gpus, cores = (int(cluster.resources.get(name, 0)) for name in ("GPU", "CPU"))
    grows = ", an autoscaler adds more" if cluster.elastic else ""
    value = f"{cluster.address}: {len(cluster.nodes)} nodes, {cores} cores, {gpus} GPUs{grows}"
    findings = [Finding("ok", "cluster", value)]
    if not cores and not gpus:
        findings = [
            Finding("ok", "cluster", value, "say how many workers it is to add: --workers N")
            if cluster.elastic
            else Finding("fail", "cluster", value, "no node takes workers: add one with cores")
        ]
    remedy = "see ray status; every node needs supsup, memory, and to be reached"
    findings += [Finding("fail", "node", problem, remedy) for problem in cluster.problems]
    for node in cluster.nodes:
        findings += _node(node, here)
    kinds = {(one.device, one.native_bf16, tuple(one.sparse)) for one in cluster.nodes}
    if len(kinds) > 1:
        shown = ", ".join(sorted({engine(one) for one in cluster.nodes}))
        remedy = "masks differ by device: keep to one kind of worker, or set --train.* by hand"
        findings.append(Finding("warn", "nodes", f"of several kinds: {shown}", remedy))
    return findings


def _node(node: Node, here: Node) -> list[Finding]:
    what = f"node {node.host}"
    wrong = _differences(here.versions | {"python": here.python}, node)
    if wrong:
        return [Finding("fail", what, wrong, "install the locked versions on every node")]
    other = [
        name
        for name, found in node.data.items()
        if _is_hash(found) and _is_hash(here.data[name]) and found != here.data[name]
    ]
    if other:
        remedy = "runs use what the command's machine has: make them the same, or remove one"
        return [Finding("fail", what, f"has another {', '.join(other)} than here", remedy)]
    absent = [name for name, found in node.data.items() if found == "absent"]
    sent = f"; the command sends it {', '.join(absent)}" if absent else ""
    gpus = f"{len(node.gpus)} GPUs" if node.gpus else f"{node.cores} cores"
    return [Finding("ok", what, f"same versions, {gpus}, {engine(node)}{sent}")]


def _differences(wanted: Mapping[str, str], node: Node) -> str:
    found = node.versions | {"python": node.python}
    return ", ".join(
        f"{name} {found[name]}, here {version}"
        for name, version in wanted.items()
        if found[name] != version
    )
