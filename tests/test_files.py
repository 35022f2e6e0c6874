"""Temporary names, what killed processes leave, and one writer at a time."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from scld_nb import files
from scld_nb.files import DAY_S, HOST, alone_in, leftovers, replacing


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has been."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_file_is_there_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.endswith(".tmp") and temporary.name.startswith(".a.txt.")
        temporary.write_text("x")
        assert not path.exists()
    assert path.read_text() == "x" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), SystemExit(3)])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_disk_that_refuses_names_the_file(tmp_path, number):
    with pytest.raises(OSError) as told, replacing(tmp_path / "a.txt"):
        raise OSError(number, "no")
    assert told.value.errno == number and told.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(OSError) as told, replacing(tmp_path / "a.txt"):
        raise OSError(number, "no", "another")
    assert told.value.filename == "another"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass


@pytest.mark.parametrize("name", ["a.txt", "a[1]*.txt", "cells of mine.h5ad", "a"])
def test_what_is_left_over_and_what_is_not(tmp_path, gone, name):
    old, path = time.time() - 2 * DAY_S, tmp_path / name
    stray = [f".{name}.{HOST}.{gone}.tmp", f".{name}.{HOST}.{'9' * 30}.tmp", f".{name}.elsewhere.7.tmp", f".{name}.dotted.name.7.tmp"]
    kept = [f".{name}.{HOST}.{os.getpid()}.tmp", f".{name}.{HOST}.1.tmp", f".{name}.elsewhere.{gone}.tmp", f".{name}.{HOST}.x.tmp", f".other{name}.{HOST}.{gone}.tmp",
            f"{name}.{HOST}.{gone}.tmp", f".{name}.{HOST}.{gone}", name]
    for one in (*stray, *kept):
        (tmp_path / one).touch()
    for one in stray[2:]:
        os.utime(tmp_path / one, (old, old))
    stray.remove(f".{name}.{HOST}.{'9' * 30}.tmp")             # no number of a process: who knows
    assert sorted(p.name for p in leftovers(path)) == sorted(stray)
    with replacing(path) as temporary:
        temporary.touch()
    assert {p.name for p in tmp_path.iterdir()} == {*kept, f".{name}.{HOST}.{'9' * 30}.tmp"} - {f".{name}.{HOST}.{os.getpid()}.tmp"}


def test_where_a_process_cannot_be_asked_for_nothing_young_is_removed(tmp_path, gone, monkeypatch):
    (tmp_path / f".a.{HOST}.{gone}.tmp").touch()
    assert len(leftovers(tmp_path / "a")) == 1
    monkeypatch.setattr(files, "fcntl", None)
    assert not leftovers(tmp_path / "a")


def test_no_folder_no_leftovers(tmp_path):
    assert leftovers(tmp_path / "nowhere" / "a") == []


HOLD = """
import sys, time
from pathlib import Path
from scld_nb.files import alone_in
with alone_in(sys.argv[1]):
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


def test_a_lock_ends_with_its_owner(tmp_path, capsys):
    shared, holds, entered = tmp_path / "shared", tmp_path / "holds", threading.Event()
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(shared), str(holds)])
    try:
        while not holds.exists():
            assert owner.poll() is None
            time.sleep(0.01)

        def enter():
            with alone_in(shared):
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        while "waiting for another process that works in shared" not in capsys.readouterr().err:
            assert waiting.is_alive()
            time.sleep(0.01)
        assert not entered.is_set()
        owner.send_signal(signal.SIGKILL)
        waiting.join(60)
        assert entered.is_set()
    finally:
        owner.kill()
        owner.wait()
    assert list(shared.iterdir()) == []


def test_who_waits_may_do_something_meanwhile(tmp_path, capsys):
    calls = []
    with ExitStack() as other:
        other.enter_context(alone_in(tmp_path))

        def meanwhile():
            calls.append(1)
            if len(calls) == 3:
                other.close()

        with alone_in(tmp_path, meanwhile):
            assert len(calls) == 3
            handle = os.open(tmp_path, os.O_RDONLY)
            with pytest.raises(BlockingIOError):               # it does hold the lock
                files.fcntl.flock(handle, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
            os.close(handle)
    assert capsys.readouterr().err.count("waiting for") == 1


def test_what_goes_wrong_meanwhile_is_not_taken_for_a_lack_of_locks(tmp_path):
    def meanwhile():
        raise ConnectionResetError("nobody answers")

    with alone_in(tmp_path), pytest.raises(ConnectionResetError):
        with alone_in(tmp_path, meanwhile):
            pytest.fail("it does not hold the lock")


def test_one_after_the_other_and_other_folders_do_not_wait(tmp_path, capsys):
    for _ in range(3):
        with alone_in(tmp_path / "a"), alone_in(tmp_path / "b"):
            pass
    assert capsys.readouterr().err == ""


def test_without_locks_work_goes_on(tmp_path, monkeypatch):
    def none(*args):
        raise OSError("no locks available")

    if files.fcntl is not None:
        monkeypatch.setattr(files.fcntl, "flock", none)
        with alone_in(tmp_path / "a"):
            assert (tmp_path / "a").is_dir()
    monkeypatch.setattr(files, "fcntl", None)
    with alone_in(tmp_path / "b"):
        assert (tmp_path / "b").is_dir()
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path / "b"):
        1 / 0
