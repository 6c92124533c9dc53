"""Ray's object store, full of what somebody else keeps there."""

import subprocess
import sys

import pytest
from ray._raylet import AuthenticationTokenLoader
from ray.cluster_utils import Cluster

from benchmarks.faults import Command
from tests.chaos import mounted, wait_until

#: Keeps as much in the store as goes into it and on the disk behind it, 440 MB at most, down to
#: small things; and reads it again and again, which pushes out what others have in the store.
HOG = """
import sys, time, numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
kept = []
for size, most in (8_000_000, 50), (110_000, 400):
    try:
        while len(kept) < most:
            kept.append(ray.put(numpy.full(size, len(kept) % 256, numpy.uint8)))
    except ray.exceptions.OutOfDiskError:
        pass
print("full", flush=True)
while True:
    for number, reference in enumerate(kept):
        assert ray.get(reference)[-1] == number % 256
        time.sleep(0.25)
"""
#: Data, masks and results of a size that goes through the store.
WORDS = (
    "permuted-digits", "--dataset", "digits-16", "--model.output-size", "500", "--tasks", "48",
    "--block-size", "8", "--train.batches", "600", "--at", "16,32,48", "--eval.images", "4",
    "--train.precision", "fp32", "--train.device", "cpu",
)  # fmt: skip


class Hog:
    """A program that fills a cluster's object store."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOG, address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        # What Ray's own processes say of a full disk comes first.
        assert any(line == b"full\n" for line in self._process.stdout)

    def works(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def cluster_of(monkeypatch):
    """Start a node with two cores, and a store of 80 MB over a folder on disk."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    AuthenticationTokenLoader.instance().reset_cache()
    started = []

    def start(folder):
        node = {
            "num_cpus": 2,
            "object_store_memory": 80_000_000,
            "object_spilling_directory": str(folder),
        }
        started.append(Cluster(initialize_head=True, head_node_args=node, connect=False))
        return started[-1].address

    yield start
    for cluster in started:
        cluster.shutdown()


@pytest.fixture
def plain(tmp_path):
    """An undisturbed run."""
    command = Command(tmp_path / "plain", "plain", (*WORDS, "--workers", "2"), tmp_path / "log0")
    assert command.wait(900) == 0, command.said()
    return command


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_full_store_slows_a_run_and_nothing_else(cluster_of, plain, tmp_path, figures):
    address = cluster_of(tmp_path / "spilled")
    hog = Hog(address)
    try:
        words = (*WORDS, "--address", address)
        command = Command(tmp_path / "runs", "pressed", words, tmp_path / "log")
        assert command.wait(900) == 0, command.said()
        assert hog.works()
    finally:
        hog.stop()
    assert "Traceback" not in command.said()
    assert command.bank_sha256() == plain.bank_sha256()
    figures(
        "440 MB of others in an object store of 80 MB: 48 tasks trained and evaluated at 3 "
        f"checkpoints, {command.tried_again()} jobs tried again, bank equal"
    )


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_full_store_over_a_full_disk_is_one_line(cluster_of, plain, tmp_path, figures):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=20m", "tmpfs") as small:
        address = cluster_of(small)
        words = (*WORDS, "--address", address)
        command = Command(tmp_path / "runs", "starved", words, tmp_path / "log")
        wait_until(lambda: command.blocks() >= 1 or command.status is not None, 600)
        assert command.status is None, command.said()
        hog = Hog(address)
        try:
            assert command.wait(900) == 1, command.said()
            blocks = command.blocks()
            refused = Command(tmp_path / "runs", "late", words, tmp_path / "log2")
            assert refused.wait(300) == 1, refused.said()
        finally:
            hog.stop()
        assert "Traceback" not in command.said() + refused.said()
        for ended, name in (command, "starved"), (refused, "late"):
            (line,) = [x for x in ended.said().splitlines() if x.startswith("supsup: ")]
            assert "Ray's object store has no room left (Local disk is full)" in line
            assert f"go on with supsup resume {name}" in line
        assert command.lost() == []
        command.resume("--address", address)
        assert command.wait(900) == 0, command.said()
    assert command.lost() == []
    assert command.bank_sha256() == plain.bank_sha256()
    figures(
        f"an object store of 80 MB and the 20 MB of disk behind it full: ended with exit status 1 "
        f"after {blocks} of 6 blocks, 0 lost; a new run is refused in one line; resumed once there "
        "was room, bank equal"
    )
