"""In the terminal: a line for each step, and below them a line that says what the next step waits for."""

import asyncio
import sys
from typing import Any

from tqdm import tqdm

from durable import journal
from program import Program


def print_step(row: dict[str, Any]) -> None:
    """`row`: of metrics.jsonl."""
    shown = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items() if k != "time"}
    with tqdm.external_write_mode():  # above the progress line
        print("  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)


async def show_progress(p: Program) -> None:
    """Only if stdout is a terminal; otherwise only the step lines are printed."""
    if not sys.stdout.isatty():
        return
    form = "{desc} |{bar:20}| {n_fmt}/{total_fmt} turns{postfix}"
    try:
        with tqdm(total=p.config.batch_size, bar_format=form, file=sys.stdout, leave=False, dynamic_ncols=True) as line:
            while True:
                line.n = min(journal.counts(p.db).get("queued", 0), p.config.batch_size)
                reward = f"reward {p.last_step['reward']:+.2f}, " if p.last_step else ""
                line.set_description_str(f"step {sum(p.steps().values())}", refresh=False)
                line.set_postfix_str(f"{reward}training {p.training.split(':')[0]}", refresh=False)
                line.refresh()
                await asyncio.sleep(1)
    except OSError:  # the terminal was closed: SIGHUP follows
        return
