"""Checkpoints on disk: one folder per step, written whole or not at all. What is in them: `trainer.save`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from durable.atomic import replacing


class CheckpointError(RuntimeError):
    """No checkpoint was written; training continues."""


def folder_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def write(out: Path, step: int, size: int, save: Callable[[Path], None]) -> None:
    """Let `save(folder)` write the checkpoint of `step`.

    `size`: bytes that must be free. CheckpointError where they aren't, or where `save` fails."""
    folder, free = folder_of(out, step), shutil.disk_usage(out).free
    if free < size:
        raise CheckpointError(f"{folder}: {size >> 20} MiB needed, {free >> 20} free")
    try:
        with replacing(folder) as part:
            save(part)
    except Exception as e:  # each library has its own exception for a full disk
        raise CheckpointError(f"{folder}: {e}") from e


def remove_others(out: Path, steps: list[int]) -> None:
    """Remove all checkpoints but these: old ones, unfinished ones, and those whose step was undone."""
    kept = {folder_of(out, step) for step in steps}
    for folder in set((out / "checkpoints").glob("step-*")) - kept:
        shutil.rmtree(folder)


def trim_metrics(metrics: Path, step: int) -> None:
    """Remove the rows of steps after `step`, which are undone, and a last line that was cut off."""
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]
        with replacing(metrics) as part:
            part.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
