"""Two hosts, and the link between them is cut in mid-run."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.faults import Command
from tests.chaos import wait_until
from tests.hosts import Network, address
from tests.test_chaos_run import QUICK

RAY = str(Path(sys.executable).with_name("ray"))
PLACE = f"{address(1)}:6379"


class TwoHosts:
    """A Ray cluster over two hosts with a core each; the first has the head, and gives commands."""

    def __init__(self, tmp_path: Path) -> None:
        self._own = Path(tempfile.mkdtemp(prefix="supsup-"))  # Ray's sockets need a short path
        self._log = tmp_path / "nodes-log"
        self.network = Network("one", "two", private=(self._own, Path("/dev/shm")))
        self._start("one", "--head", "--port=6379", f"--temp-dir={self._own}")
        wait_until(lambda: "Ray runtime started" in self._log.read_text(), 200)
        self.second = self.start_second()

    def start_second(self) -> subprocess.Popen:
        return self._start("two", f"--address={PLACE}")

    def stop(self) -> None:
        self.network.stop()
        shutil.rmtree(self._own)

    def run(self, folder: Path, name: str, words) -> Command:
        """Give the run's command on the first host."""
        behind = self.network.hosts["one"].words
        return Command(folder / "runs", name, words, folder / f"{name}-log", behind)

    def workers_of(self, name: str) -> set[str]:
        """Return the process ids of a host's workers."""
        said = self.network.hosts[name].do("ps", "-eo", "pid,args")
        return set(re.findall(r"^ *(\d+) ray::TaskWorker", said, re.M))

    def _start(self, name: str, *words: str) -> subprocess.Popen:
        at = address(list(self.network.hosts).index(name) + 1)
        command = [RAY, "start", *words, f"--node-ip-address={at}", "--num-cpus=1"]
        command += ["--object-store-memory=200000000", "--include-dashboard=false", "--block"]
        if "--head" not in words:
            command.remove("--include-dashboard=false")
        env = dict(os.environ)
        return self.network.hosts[name].start(*command, log=self._log, env=env)


@pytest.fixture
def hosts(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    started = TwoHosts(tmp_path)
    yield started
    started.stop()


def words_of(tasks: int) -> list[str]:
    found = {"16": str(tasks), "8,16": str(tasks), "--workers": "--address", "400": "3000"}
    words = [found.get(word, word) for word in QUICK]
    words[words.index("--address") + 1] = PLACE
    return words


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("seconds", "tasks"), [(5, 24), (60, 60)])
def test_a_link_that_is_cut_is_survived(hosts, tmp_path, seconds, tasks, figures):
    words = words_of(tasks)
    command = hosts.run(tmp_path, "cut", words)
    wait_until(lambda: command.blocks() >= 4 or command.status is not None, 600)
    assert command.status is None, command.said()
    workers = hosts.workers_of("two")
    assert len(workers) == 1
    before = command.blocks()
    hosts.network.cut("two", seconds)
    during, back_at = command.blocks() - before, time.monotonic()
    if seconds < 30:
        told = "its worker went on"
        assert hosts.workers_of("two") == workers
        assert command.tried_again() == 0
    else:
        assert during > 0, "the first host stood still meanwhile"
        # Ray has given the host up: its node ends when it hears of that, and is started again, as
        # systemd or Kubernetes would.
        assert hosts.second.wait(200) != 0
        ended = time.monotonic() - back_at
        hosts.second = hosts.start_second()
        wait_until(lambda: hosts.workers_of("two") - workers or command.status is not None, 300)
        assert command.status is None, command.said()
        used = time.monotonic() - back_at
        told = (
            f"its node ended {ended:.1f} s after it was back, a new one worked {used:.1f} s after"
        )
        assert f"its node {address(2)} was lost" in command.said()
    assert command.wait(1500) == 0, command.said()
    assert "Traceback" not in command.said()
    assert "(raylet)" not in command.said()
    assert command.lost() == []
    plain = hosts.run(tmp_path, "plain", words)
    assert plain.wait(1500) == 0, plain.said()
    assert command.bank_sha256() == plain.bank_sha256()
    figures(
        f"link cut for {seconds} s: {during} blocks meanwhile, {command.tried_again()} jobs tried "
        f"again; {told}; bank equal"
    )
