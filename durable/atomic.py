"""Files and folders that are complete or absent, even after kill -9 or on a full disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path next to `path`: write the new file or folder there. It replaces `path` when the block ends; after
    an error in the block it is removed, and `path` is unchanged. After a crash or a power cut, `path` is the old one or
    the new one. A folder may also be absent: the old one is removed before the new one takes its place."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        for written in (*part.rglob("*"), part):
            sync(written)
        if part.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a rename can't replace a folder that has files in it
        part.replace(path)
        sync(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def append(path: Path, line: bytes) -> None:
    """Append a line, or nothing: OSError if it doesn't fit on the disk."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
