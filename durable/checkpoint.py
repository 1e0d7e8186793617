"""Checkpoints on disk: one folder per step, written completely or not at all. `trainer.save` writes their contents."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from durable.atomic import replacing, sync


class CheckpointError(RuntimeError):
    """No checkpoint was written; training continues."""


def home(out: Path, owner: str) -> Path:
    """The folder of an owner's checkpoints. `owner`: a user's name, or "" for the shared weights."""
    name = owner if re.fullmatch(r"[\w.@-]{1,100}", owner, re.A) else hashlib.sha256(owner.encode()).hexdigest()[:32]
    return out / "checkpoints" / (f"of-{name}" if owner else "")


def folder_of(out: Path, owner: str, step: int) -> Path | None:
    """The folder of a checkpoint. None for step 0: the starting weights have no checkpoint."""
    return home(out, owner) / f"step-{step:06d}" if step else None


def write(folder: Path, size: int, save: Callable[[Path], None]) -> None:
    """Let `save(folder)` write a checkpoint.

    `size`: bytes that must be free. CheckpointError if they aren't, or if `save` fails."""
    free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
    if free < size:
        raise CheckpointError(f"{folder}: {size >> 20} MiB needed, {free >> 20} free")
    try:
        with replacing(folder) as part:
            save(part)
    except Exception as e:  # each library has its own exception for a full disk
        raise CheckpointError(f"{folder}: {e}") from e


def remove_others(out: Path, listed: list[tuple[str, int]]) -> None:
    """Remove all checkpoints but these, by owner and step: old, unfinished and reverted ones."""
    if (log := out / "journal.db-wal").exists():
        sync(log)  # on the disk before the folders that it no longer lists are gone
    kept = {folder_of(out, owner, step) for owner, step in listed}
    for folder in set((out / "checkpoints").glob("**/step-*")) - kept:
        shutil.rmtree(folder)
        if folder.parent.name != "checkpoints" and not any(folder.parent.iterdir()):
            folder.parent.rmdir()  # its name may be a user's, which should not stay


def trim_metrics(metrics: Path, steps: dict[str, int]) -> None:
    """Remove the rows of reverted steps, those after `steps` (owner -> step), and an incomplete last line."""
    keep_metrics(metrics, lambda row: row["step"] <= steps.get(row.get("owner", ""), 0))


def forget_metrics(metrics: Path, owner: str) -> None:
    """Remove the rows of an owner's steps, and an incomplete last line."""
    keep_metrics(metrics, lambda row: row.get("owner") != owner)


def keep_metrics(metrics: Path, keep: Callable[[dict], bool]) -> None:
    """Lines that can't be read, such as the zeros that a power cut may leave, are removed too."""
    if metrics.exists():
        kept = []
        for line in metrics.read_bytes().splitlines(True):
            with suppress(ValueError):
                if keep(json.loads(line)) and line.endswith(b"\n"):
                    kept.append(line)
        with replacing(metrics) as part:
            part.write_bytes(b"".join(kept))
