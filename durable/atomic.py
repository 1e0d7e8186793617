"""Files and folders that exist whole or not at all, also after kill -9 or on a full disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path next to `path`: write the new file or folder there. It replaces `path` when the block ends; after
    an error it is removed, and `path` is as it was."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if part.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a rename can't replace a folder that has files in it
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
