"""Several nodes on one machine: one is lost in mid-run, another is added."""

import re
import time

import pytest
from ray._raylet import AuthenticationTokenLoader
from ray.cluster_utils import Cluster

from benchmarks.faults import Command
from tests.chaos import wait_until
from tests.test_chaos_run import QUICK

TOKEN = "0" * 64


@pytest.fixture
def nodes(monkeypatch):
    """A head without work and two nodes with a core each; other Ray settings than the session's."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    AuthenticationTokenLoader.instance().reset_cache()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}, connect=False)
    cluster.worker_nodes_of_test = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def words_of(cluster, tasks):
    at = f"{tasks // 2},{tasks}"
    options = {"--tasks": str(tasks), "--at": at, "--address": cluster.address}
    words = [word for word in QUICK if word != "--workers"]
    words.remove("2")
    for option, value in options.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_lost_node_is_survived_and_an_added_one_is_used(nodes, tmp_path, figures):
    # Many, for a new node is at work within half a minute where little else runs.
    words = words_of(nodes, 120)
    command = Command(tmp_path / "runs", "nodes", words, tmp_path / "log")
    wait_until(lambda: command.blocks() >= 3 or command.status is not None, 900)
    assert command.status is None, command.said()
    lost_at, before = time.monotonic(), command.blocks()
    nodes.remove_node(nodes.worker_nodes_of_test[0], allow_graceful=False)
    wait_until(lambda: command.tried_again() >= 1, 300)
    noticed = time.monotonic() - lost_at
    wait_until(lambda: command.blocks() >= before + 2, 600)
    added_at = time.monotonic()
    new = nodes.add_node(num_cpus=1)
    wait_until(lambda: _works_on(new, command), 600)
    used = time.monotonic() - added_at
    assert command.wait(1500) == 0, command.said()
    assert command.lost() == []
    assert "Traceback" not in command.said()
    plain = Command(tmp_path / "runs", "plain", QUICK[:1] + tuple(words[1:-2]), tmp_path / "log2")
    assert plain.wait(1500) == 0, plain.said()
    assert command.bank_sha256() == plain.bank_sha256()
    figures(
        f"node lost: noticed after {noticed:.1f} s, {command.tried_again()} jobs tried again; node "
        f"added: at work {used:.1f} s later; bank equal"
    )


def _works_on(node, command) -> bool:
    """Say whether the run has a worker that trains on a node."""
    import psutil

    assert command.status is None, command.said()
    raylet = node.all_processes["raylet"][0].process.pid
    children = psutil.Process(raylet).children(recursive=True)
    return any(re.match(r"ray::TaskWorker", " ".join(_line(p))) for p in children)


def _line(process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []
