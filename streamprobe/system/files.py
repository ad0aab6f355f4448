"""Files that lose nothing: replaced whole or not at all, written where the user said, locked while they are in use."""

import errno
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from streamprobe.errors import InputError

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # what a file system without locks answers
PROBE = bytes(4096)  # a block: a full disk has no room for it


class Unwritable(InputError):
    """A file of a run that could not be written, whatever the run itself had to say."""


def reason(error: Exception) -> str:
    """What the system says is wrong, without the path and the number."""
    return getattr(error, "strerror", None) or str(error)


def unwritable(path: Path, error: Exception) -> Unwritable:
    """What is reported of a file of a run that could not be written."""
    return Unwritable(
        f"{path}, which cannot be written ({reason(error)})",
        "room on the disk and the right to write there",
        "make room, then the same command again, for a run with --resume",
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file of a run that is either the old one or the whole new one at every moment, also after a power cut.

    A link is followed, and stays.  Raises InputError where it cannot be written; nothing of the new one is left then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = _target(path)
        _replace(target, content, _part(target))
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error


def probe(path: Path) -> None:
    """Raises OSError or ValueError where `write_atomic` could not write `path` as things stand."""
    target = _target(path)
    if target.parent.exists():
        _write(_part(target), PROBE)
        _part(target).unlink()
    else:
        _part(target).is_file()  # fails if the name is too long


def _target(path: Path) -> Path:
    """The file that is replaced where `path` is written: itself, or what a link leads to."""
    if path.is_symlink():
        path = Path(os.path.realpath(path, strict=True))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a device or a pipe")
    return path


def _part(target: Path) -> Path:
    """Where the new content of a file lies until it is whole."""
    return target.with_name(target.name + ".part")


def _replace(target: Path, content: bytes, part: Path) -> None:
    """Puts `content` in the place of `target`, by way of the file `part` beside it; none is left if that fails."""
    _write(part, content)
    try:
        os.replace(part, target)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _write(part: Path, content: bytes) -> None:
    """A new file with this content, on the disk; none if that fails."""
    part.unlink(missing_ok=True)  # of a process that was killed; never written through, should it be a link
    try:
        with open(part, "xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def check_output(path: Path, name: str) -> None:
    """Raises InputError where `write_output` could not write `path`, which --`name` gave; before the work is done."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not path.exists() or not _in_place(path):
            target = Path(os.path.realpath(path))  # also of a link to nothing yet
            if not target.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "its folder does not exist")
            _write(_private_part(_target(target)), PROBE)
            _private_part(target).unlink()
    except (OSError, ValueError) as error:
        raise _no_output(path, name, error) from error


def write_output(path: Path, content: bytes, name: str) -> None:
    """Writes what the user asked for with --`name`.

    A file is replaced whole; a device, a pipe and what a link leads to are written in place, since they are not ours
    to replace.  Raises InputError where that fails.
    """
    try:
        if _in_place(path):
            with _open_in_place(path) as f:
                f.write(content)
        else:
            _replace(path, content, _private_part(path))
    except (OSError, ValueError) as error:
        raise _no_output(path, name, error) from error


def _private_part(target: Path) -> Path:
    """A name that nothing of the user's has: the folder is not a run's."""
    return target.with_name(f".streamprobe-{os.getpid()}.part")


def _no_output(path: Path, name: str, error: Exception) -> InputError:
    return InputError(
        f"{name} {path}, which cannot be written ({reason(error)})",
        "a file in a folder that exists, with room for it",
        f"give another --{name}",
    )


def _in_place(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())


def _open_in_place(path: Path) -> BinaryIO:
    """The file, emptied; but an open output stream where it is one (/dev/stdout), whose text must stay."""
    with suppress(FileNotFoundError):
        found = os.stat(path)
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            with suppress(OSError):  # the number may be closed
                if os.path.samestat(found, os.fstat(number)):
                    stream.flush()
                    return os.fdopen(os.dup(number), "wb")
    return open(path, "wb")


def lock(path: Path) -> FileLock | None:
    """The lock that the file `path` stands for, held until it is released or this process ends, however that is.

    Raises filelock.Timeout where another process holds it, and OSError where the file cannot be made.  None where the
    file system has no locks.
    """
    held = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        held.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return held


def check_room(folder: Path, needed: int, largest: int) -> None:
    """Raises InputError where the disk of `folder` has no room for `needed` bytes, or a file may not have `largest`."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some file systems know of no size
        raise InputError(
            f"{_megabytes(disk.free)} free on the disk of {folder}",
            f"{_megabytes(needed)} for the checkpoint, which is there twice while it is replaced, and the probes",
            "make room, or choose another --output_dir",
        )
    limit = _largest_file()
    if limit is not None and limit < largest:
        raise InputError(
            f"a limit of {_megabytes(limit)} on the size of a file",
            f"{_megabytes(largest)}, the checkpoint's",
            "raise it (ulimit -f)",
        )


def _largest_file() -> int | None:
    """Bytes that a file of this process may have; None without a limit."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limits
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
