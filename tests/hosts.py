"""Hosts on one machine: each with its own network, processes and memory files, a switch between."""

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

_SWITCH = "switch"


class Host:
    """A host: everything that is run in it ends with it."""

    def __init__(self, name: str, private: Sequence[Path] = ()) -> None:
        """Start it, cut off from everything; skip the test where that is not allowed.

        Args:
            name: its host name.
            private: folders that it has an own, empty one of.
        """
        self.name = name
        mounts = "".join(f"mount -t tmpfs tmpfs {folder} && " for folder in private)
        # The shell stays in the foreground as process 1: it takes in what is orphaned.
        script = f"hostname {name} && {mounts}ip link set lo up && echo up && sleep infinity & wait"
        words = ["--net", "--uts", "--mount", "--propagation", "private"]
        words += ["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        self._process = subprocess.Popen(
            ["unshare", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if self._process.stdout.readline().strip() != "up":
            self._process.kill()
            pytest.skip(f"hosts of its own are not allowed here: {self._process.stderr.read()}")
        (first,) = psutil.Process(self._process.pid).children()
        self.pid = first.pid
        self._started: list[subprocess.Popen] = []

    @property
    def words(self) -> tuple[str, ...]:
        """What a command is put behind, to be run in this host."""
        return ("nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", "--")

    def do(self, *words: str) -> str:
        """Run something in it to its end; return what it says."""
        done = subprocess.run([*self.words, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *words: str, log: Path, env: Mapping[str, str]) -> subprocess.Popen:
        """Start something in it."""
        with log.open("ab") as out:
            process = subprocess.Popen([*self.words, *words], stdout=out, stderr=out, env=env)
        self._started.append(process)
        return process

    def stop(self) -> None:
        """End it, and all that runs in it."""
        self._process.kill()
        self._process.communicate()
        for process in self._started:
            process.wait()


class Network:
    """Hosts in one network, 10.77.0.0/24, behind a switch whose ports can be cut."""

    def __init__(self, *names: str, private: Sequence[Path] = ()) -> None:
        """Start the hosts; skip the test where that is not allowed."""
        for tool in ("unshare", "nsenter", "ip"):
            if not shutil.which(tool):
                pytest.skip(f"there is no {tool} here")
        self._switch = Host(_SWITCH)
        self.hosts = {name: Host(name, private) for name in names}
        self._switch.do("ip", "link", "add", "bridge", "type", "bridge")
        self._switch.do("ip", "link", "set", "bridge", "up")
        for number, host in enumerate(self.hosts.values(), 1):
            port = ("ip", "link", "add", host.name, "netns", str(self._switch.pid), "type", "veth")
            cable = (*port, "peer", "name", "eth0", "netns", str(host.pid))
            subprocess.run(cable, check=True, capture_output=True)
            self._switch.do("ip", "link", "set", host.name, "master", "bridge", "up")
            host.do("ip", "address", "add", f"{address(number)}/24", "dev", "eth0")
            host.do("ip", "link", "set", "eth0", "up")

    def cut(self, name: str, seconds: float) -> None:
        """Pull a host's cable out of the switch for some seconds."""
        self._switch.do("ip", "link", "set", name, "down")
        time.sleep(seconds)
        self._switch.do("ip", "link", "set", name, "up")

    def stop(self) -> None:
        """End all hosts."""
        for host in (*self.hosts.values(), self._switch):
            host.stop()


def address(number: int) -> str:
    """Return the address of the first, second ... host."""
    return f"10.77.0.{number}"
