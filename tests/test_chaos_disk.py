"""Disks that fail: at every call, when they are full, and in a power cut."""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.worker import TaskWorker, WorkerSetup
from supsup.bank import Bank
from supsup.errors import DiskFault
from supsup.files import publish
from tests.chaos import SUPSUP, mounted, wait_until
from tests.test_coordinator import Notes, make_jobs, work

CALLS = ("open", "fsync", "link", "replace", "unlink")


class Disk:
    """Fails at the k-th of some system calls, and counts them."""

    def __init__(self, monkeypatch, fail_at=None):
        self.count, self.fail_at = 0, fail_at
        for name in CALLS:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, real):
        def call(*args, **names):
            self.count += 1
            if self.count == self.fail_at:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **names)

        return call


@pytest.mark.slow
def test_an_error_at_any_call_loses_nothing_and_a_resume_mends_it(
    tmp_path, quick, digits, bank, monkeypatch, figures
):
    """Every open, fsync, link, replace and unlink of a whole run fails once."""
    manifest = bank.manifest
    worker = TaskWorker(WorkerSetup(config=quick, weights_sha256=manifest.weights_sha256), digits)

    def begin(name):
        path = tmp_path / name
        path.mkdir()
        return Bank.create(path, manifest)

    work(make_jobs(quick, begin("first"), Notes()), worker)  # what is made at first use, is
    with monkeypatch.context() as patch:
        whole = begin("whole")
        calls = Disk(patch)
        work(make_jobs(quick, whole, Notes()), worker)
        total = calls.count
    expected, stopped, refused = whole.sha256(8), 0, 0
    for k in range(1, total + 1):
        broken = begin(f"k{k}")
        acknowledged = []
        with monkeypatch.context() as patch:
            Disk(patch, fail_at=k)
            try:
                jobs = make_jobs(quick, broken, Notes())
                while job := jobs.next_job():
                    jobs.done(job, getattr(worker, job.method)(*job.args))
                    if job.method == "train":
                        acknowledged.append(job.args[0])
            except DiskFault as error:
                refused += 1
                assert "Input/output error; the blocks before it are safe" in str(error)
            except OSError as error:
                stopped += 1
                assert error.errno == errno.EIO
        found = Bank.open(broken.path).stock()
        assert not found.damaged
        assert set(acknowledged) <= set(found.tasks)
        again = Bank.open(broken.path)
        again.discard_leftovers()
        work(make_jobs(quick, again, Notes()), worker)
        assert again.sha256(8) == expected
    assert stopped + refused == total == 30
    figures(
        f"{total} calls failed one by one: each stopped the run with a clear error, "
        "0 acknowledged blocks lost, every bank equal after a resume"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_is_one_line_and_a_resume_goes_on_once_there_is_room(tmp_path, figures):
    words = ["run", "permuted-digits", "--name", "full", "--tasks", "300", "--block-size", "5"]
    words += ["--train.batches", "20", "--train.precision", "fp32", "--scenario", "gg"]
    words += ["--model.output-size", "30"]
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=5m", "none") as small:
        command = [SUPSUP, *words, "--workers", "1", "--runs-dir", "runs"]
        options = {"cwd": small, "capture_output": True, "text": True, "timeout": 400}
        filler = small / "filler"
        filler.write_bytes(bytes(2_500_000))
        done = subprocess.run(command, **options)
        assert done.returncode == 1, done.stderr
        assert "No space left on device" in done.stderr
        assert "is finished is safe" in done.stderr or "before it are safe" in done.stderr
        assert "Traceback" not in done.stderr
        bank = Bank.open(small / "runs" / "full")
        kept = {tasks: bank.read(tasks).masks.tobytes() for tasks, _ in bank.blocks()}
        assert kept
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = subprocess.run([SUPSUP, "resume", "full", "--workers", "1"], **options)
        assert done.returncode == 0, done.stderr
        assert len({t for tasks, _ in bank.blocks() for t in tasks}) == 300
        assert all(bank.read(tasks).masks.tobytes() == m for tasks, m in kept.items())
    learned = sum(map(len, kept))
    figures(f"disk full after {learned} tasks: 0 lost; resumed after room was made, 300 tasks")


def _holds(path, count):
    return _lines(path) >= count


def _lines(path):
    return path.read_text().count("\n")


WRITER = """
import sys
from pathlib import Path
from supsup.files import publish
folder, k = Path(sys.argv[1]), 0
while True:
    publish(folder / f"block-{k}", bytes([k % 256]) * 20000)
    print(k, flush=True)
    k += 1
"""


@pytest.mark.slow
def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path, figures):
    """Copy the file system's image while the writer is stopped, mount the copy, and read."""
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not mkfs:
        pytest.skip("there is no mkfs.ext4 here")
    image, copy = tmp_path / "disk.img", tmp_path / "copy.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([mkfs, "-q", str(image)], check=True)
    acknowledged = lost = 0
    for cut in range(5):
        with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
            folder = disk / f"cut{cut}"
            folder.mkdir()
            command = [sys.executable, "-c", WRITER, str(folder)]
            # What the writer has acknowledged is in a file of another file system.
            with (tmp_path / f"said{cut}").open("w") as said:
                writer = subprocess.Popen(command, stdout=said)
            try:
                wait_until(functools.partial(_holds, tmp_path / f"said{cut}", 20 + 7 * cut))
                time.sleep(0.003 * cut)
                writer.send_signal(signal.SIGSTOP)
                while psutil.Process(writer.pid).status() != psutil.STATUS_STOPPED:
                    time.sleep(0.01)
                last = _lines(tmp_path / f"said{cut}") - 1
                shutil.copyfile(image, copy)
            finally:
                writer.kill()
                writer.communicate()
        with mounted(tmp_path / "after", "-o", "loop", str(copy)) as after:
            for k in range(last + 1):
                path = after / f"cut{cut}" / f"block-{k}"
                acknowledged += 1
                lost += not path.exists() or path.read_bytes() != bytes([k % 256]) * 20000
    assert lost == 0
    figures(f"5 power cuts: {acknowledged} blocks acknowledged, {lost} lost")


def test_a_name_appears_between_two_syncs(tmp_path, monkeypatch):
    """Of what the name stands for, and of the folder that has it."""
    order = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, _real=real, _name=name: (order.append(_name), _real(*a))[1]
        )
    publish(tmp_path / "block", b"x")
    assert order == ["fsync", "link", "fsync"]
    assert Path(tmp_path / "block").read_bytes() == b"x"
