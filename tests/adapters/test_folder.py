"""Whatever ends a save (a kill, a full disk, a refusal of the file system), the folder reads as all old or all new."""

import errno
import os
import resource
from pathlib import Path

import pytest

from lorakit.adapters.folder import SAVED, SAVING, locate, write_files
from lorakit.core.errors import CheckpointError

OLD = {"weights": b"old" * 1000, "record": b"old"}
NEW = {"weights": b"new" * 1000, "record": b"new"}
CALLS = ("mkdir", "rename", "replace", "rmdir", "fsync", "unlink", "open", "close")


def state(folder):
    """What a reader sees."""
    found = {name: locate(folder, name) for name in OLD}
    return {name: path.read_bytes() if path else None for name, path in found.items()}


def interrupted(monkeypatch, names, at, act):
    """Let `act` take the place of the n-th call of these functions of os."""
    calls = iter(range(10**6))

    def counted(real):
        def call(*args, **kwargs):
            if next(calls) == at:
                act()
            return real(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def complaint(folder):
    """What a failing save says."""
    try:
        write_files(folder, NEW)
    except CheckpointError as error:
        return str(error)
    return None


def test_files_are_written_replaced_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "logs").mkdir()
    assert write_files(tmp_path, OLD) == tmp_path
    write_files(tmp_path, NEW)
    assert state(tmp_path) == NEW
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "logs", "record", "weights"]
    assert not (tmp_path / "README.md").stat().st_mode & 0o111
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "README.md").stat().st_mode


def test_the_working_directory_can_be_saved_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(".", OLD)
    write_files(Path(), NEW)
    assert state(tmp_path) == NEW


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12: a fork beside threads; the child starts none
@pytest.mark.parametrize("stuck", [False, True], ids=["", "while undoing"])
@pytest.mark.parametrize("old", [OLD, None], ids=["over an old one", "first"])
def test_killed_at_every_call(old, stuck, tmp_path):
    """A child process dies, without any clean-up, at its first, second, third … call into the file system.

    `stuck`: no file can be moved either, so that the save is being undone when the process dies.
    """

    def refuse(*args):
        raise PermissionError(errno.EACCES, "no")

    seen = set()
    for at in range(200):
        folder = tmp_path / str(at)
        if old:
            write_files(folder, old)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                if stuck:
                    patch.setattr(os, "replace", refuse)
                interrupted(patch, CALLS, at, lambda: os._exit(9))
                complaint(folder)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found = state(folder)
        assert found in (NEW, old or {"weights": None, "record": None})
        seen.add(found["record"])
        write_files(folder, OLD)  # and the next save works, and leaves nothing behind
        assert state(folder) == OLD
        assert sorted(p.name for p in folder.iterdir()) == sorted(OLD)
        if not died:
            break
    assert at > 10
    assert {b"new", b"old" if old else None} >= seen
    assert len(seen) == 2 or stuck


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_at_every_call_is_one_clear_line(number, tmp_path):
    """Never a mixture, never a leftover folder of a first save; and what the message says is so."""

    def fail():
        raise OSError(number, os.strerror(number))

    for at in range(40):
        folder = write_files(tmp_path / str(at), OLD)
        with pytest.MonkeyPatch.context() as patch:
            interrupted(patch, CALLS, at, fail)
            message = complaint(folder)
        if message is None:  # the call did not matter (removing what is removed already), or came no more
            assert state(folder) == NEW
            continue
        assert state(folder) in (OLD, NEW)
        assert "\n" not in message
        assert str(folder) in message
        assert ("unchanged" in message) == (state(folder) == OLD)
        write_files(folder, NEW)
        assert sorted(p.name for p in folder.iterdir()) == sorted(NEW)
    assert state(tmp_path / "0") == NEW


def test_a_disk_that_refuses_more_bytes(tmp_path):
    """By the operating system's own limit on the size of files."""
    write_files(tmp_path / "a", OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        for name in ("a", "b/c"):
            with pytest.raises(CheckpointError, match=f"cannot save to .*{name}.*File too large"):
                write_files(tmp_path / name, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state(tmp_path / "a") == OLD
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(OLD)
    assert not (tmp_path / "b").exists()  # folders made for a save that failed go with it


def test_a_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk is full; what was saved there before is unchanged"):
        write_files(tmp_path / "a", NEW)


def test_a_file_where_a_folder_is_expected(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="a file has that name"):
        write_files(tmp_path / "file", NEW)
    with pytest.raises(CheckpointError, match="a part of that path is a file"):
        write_files(tmp_path / "file" / "deeper", NEW)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_dead_saves_left_is_removed(tmp_path):
    write_files(tmp_path, OLD)
    (tmp_path / f"{SAVING}0123").mkdir()
    (tmp_path / f"{SAVING}0123" / "weights").write_bytes(b"half")
    assert state(tmp_path) == OLD
    (tmp_path / SAVED).mkdir()
    (tmp_path / SAVED / "record").write_bytes(b"new")  # killed after the weights were moved
    (tmp_path / "weights").write_bytes(NEW["weights"])
    assert state(tmp_path) == NEW
    write_files(tmp_path, OLD)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(OLD)
