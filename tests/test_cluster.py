"""Clusters that are busy, silent or yet to grow, and Ray's start: long paths, and SIGTERM in it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import ray

from orchestrator import cluster as clusters
from orchestrator import starting
from supsup.errors import UserError
from tests.test_run import wait_for


class Holder:
    """Holds cores, and does nothing."""


def free_cores() -> float:
    return ray.available_resources().get("CPU", 0)


def test_a_busy_cluster_says_what_it_is_and_that_a_run_waits_for_room(cluster):
    cores = ray.cluster_resources()["CPU"]
    wait_for(lambda: free_cores() == cores, 60)
    clusters._say_if_full(cluster)
    holder = ray.remote(Holder).options(num_cpus=cores).remote()
    try:
        wait_for(lambda: free_cores() == 0, 60)
        with pytest.warns(UserWarning, match=r"others use all cores .* room, 5 minutes at most"):
            clusters._say_if_full(cluster)
        assert clusters._probe("cpu").device == clusters.this_machine().device
    finally:
        ray.kill(holder)


def broken(asked):
    raise ModuleNotFoundError("no supsup")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda asked: time.sleep(2), r"no answer in 0 s\); see supsup doctor"),
        (broken, "ModuleNotFoundError: no supsup"),
    ],
)
def test_a_node_that_cannot_take_workers_is_one_line(cluster, monkeypatch, answer, said):
    monkeypatch.setattr(clusters, "this_machine", answer)
    monkeypatch.setattr(clusters, "_ANSWER_SECONDS", 0.1 if answer is not broken else 60.0)
    with pytest.raises(UserError, match=said):
        clusters._probe("cpu")


@pytest.mark.parametrize(
    ("device", "found"), [("cpu", "small"), ("cuda", "large"), ("auto", "large")]
)
def test_a_node_is_asked_that_has_the_device(monkeypatch, device, found):
    nodes = [
        {"NodeID": "lost", "Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"NodeID": "head", "Alive": True, "Resources": {"memory": 1e9}},
        {"NodeID": "small", "Alive": True, "Resources": {"CPU": 8.0}},
        {"NodeID": "large", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert clusters._node_for(device)["NodeID"] == found
    del nodes[2:]
    with pytest.raises(UserError, match="has no node with"):
        clusters._node_for(device)


# --- an autoscaler that has added nothing yet ----------------------------------------------------


@pytest.fixture
def empty(monkeypatch):
    """A cluster without a worker, and an autoscaler; what it is asked for is noted."""
    asked = []
    monkeypatch.setattr(clusters, "joined", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(clusters, "is_elastic", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(clusters, "_await_first_node", asked.append)
    monkeypatch.setattr(clusters, "_probe", lambda device: clusters._expected(device))
    return asked


@pytest.mark.parametrize(
    ("device", "taken_for"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")]
)
def test_a_look_at_a_cluster_starts_no_node(empty, device, taken_for):
    with (
        pytest.warns(UserWarning, match="no worker yet, so what they run on isn't known"),
        clusters.connect("auto", 8, device, look=True) as found,
    ):
        assert (found.machine.device, found.workers) == (taken_for, 8)
    assert empty == []


def test_a_run_has_a_node_started(empty):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with clusters.connect("auto", 8, "cuda"):
            assert empty == ["cuda"]


@pytest.mark.parametrize("look", [False, True])
def test_a_cluster_without_a_worker_has_to_be_told_how_many(empty, look):
    with (
        pytest.raises(UserError, match="--workers N"),
        clusters.connect("a", None, "auto", look=look),
    ):
        pass
    assert empty == []


def test_the_plan_of_a_sweep_is_a_look(monkeypatch, tmp_path):
    from sweeps import session
    from sweeps.work import Options

    class SeenError(Exception):
        pass

    def seen(*_: object, look: bool = False) -> None:
        raise SeenError(look)

    monkeypatch.setattr(session, "connect", seen)
    with pytest.raises(SeenError, match="True"):
        session.plan(session.spec_for("fig4"), Options(runs_dir=tmp_path, address="auto"))


# --- Ray's start ---------------------------------------------------------------------------------


def test_the_files_of_ray_have_a_path_that_its_sockets_take(monkeypatch, tmp_path):
    session = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    for length in (starting.LONGEST, starting.LONGEST + 1):
        place = Path("/tmp", "x" * (length - len("/tmp/")))
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        folder = starting._scratch()
        ray._private.utils.validate_socket_filepath(str(folder / session))
        assert folder.parent == (place if length == starting.LONGEST else Path("/tmp"))
        folder.rmdir()
        place.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(UserError, match="set TMPDIR to one that can be written"):
        starting._scratch()


class StopError(Exception):
    """What the handler of a test raises."""


@pytest.fixture
def stopping():
    """A handler of SIGTERM that raises, as the command's does."""

    def stop(*_: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGTERM, stop)
    yield stop
    signal.signal(signal.SIGTERM, before)


def start_of_ray(error: Exception | None) -> None:
    """Do with SIGTERM what ray.init does, and then fail, or be told to end."""
    ray._private.utils.set_sigterm_handler(signal.SIG_IGN)
    if error:
        raise error
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("error", [RuntimeError("timed out during startup"), None])
def test_sigterm_does_the_same_while_ray_starts_and_after_it_failed(stopping, error):
    theirs = ray._private.utils.set_sigterm_handler
    with pytest.raises(type(error) if error else StopError), starting.own_sigterm():
        start_of_ray(error)
    assert signal.getsignal(signal.SIGTERM) is stopping
    assert ray._private.utils.set_sigterm_handler is theirs


def test_a_sigterm_that_ray_swallows_is_taken_at_the_end(stopping):
    with pytest.raises(StopError), starting.own_sigterm(), contextlib.suppress(StopError):
        signal.raise_signal(signal.SIGTERM)


def test_a_sigterm_that_only_was_noted_is_not_taken_twice():
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
    try:
        with starting.own_sigterm():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [1]


def test_sigterm_while_ray_starts_leaves_nothing():
    code = """
import signal, sys
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
from orchestrator.starting import embedded
try:
    with embedded(1):
        pass
except KeyboardInterrupt:
    sys.exit(143)
"""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as place:
        environment = os.environ | {"TMPDIR": place, "RAY_AUTH_MODE": "token"}
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as started:
            wait_for(lambda: any(Path(place).glob("supsup-*/session_2*/logs/gcs_server*")), 60)
            started.send_signal(signal.SIGTERM)
        assert started.returncode == 143
        wait_for(lambda: not any(place in line for line in command_lines()), 10)


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return found


def test_a_worker_that_shall_use_the_cpu_is_asked_about_the_cpu(monkeypatch):
    """A GPU multiplies bf16 where the processor beside it may not."""
    monkeypatch.setattr(clusters.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(clusters, "native_bf16", lambda device: device == "cuda")
    monkeypatch.setattr(clusters, "fused_kernels_here", lambda: True)
    assert clusters.this_machine().native_bf16
    assert clusters.this_machine().fused
    assert clusters.this_machine("cuda").device == "cuda"
    found = clusters.this_machine("cpu")
    assert (found.device, found.native_bf16, found.fused) == ("cpu", False, False)


TWICE = """
import os
import ray
from orchestrator.starting import embedded
os.environ["RAY_AUTH_TOKEN"] = "0" * 64
seen = set()
for _ in range(2):
    with embedded(1):
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        seen.add(os.environ["RAY_AUTH_TOKEN"])
print(len(seen), os.environ["RAY_AUTH_TOKEN"] == "0" * 64)
"""


@pytest.mark.slow
def test_one_process_may_start_ray_again_and_again_each_with_a_token_of_its_own():
    """As a notebook does that runs two sweeps."""
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2", "True"], done.stderr
