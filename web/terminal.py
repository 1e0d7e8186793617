"""In the terminal: a summary at the start, a line for each step, and below them what the next step waits for."""

import asyncio
import socket
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clients import paste
from clients.keys import Keys
from config import Config
from durable import journal
from machine.plan import Plan
from program import Program


def summary(config: Config, plan: Plan, engine_args: Namespace, keys: Keys) -> str:
    """What is printed at startup: judge, parsers, address, page, folder, and what to paste into OpenClaw."""
    url = config.url
    if config.host in ("0.0.0.0", "::"):
        url = url.replace("127.0.0.1", socket.getfqdn())
    key = "any" if keys.users() is None else f"one of those in {keys.file.resolve()}"
    return (
        f"judge     {config.judge_url or 'the model itself'}, {plan.judge_style} style\n"
        f"parsers   tool calls {engine_args.tool_call_parser or 'none'}, thinking {config.reasoning_parser or 'none'}\n"
        f"address   {url}  model {config.name!r}  key {key}\n"
        f"page      {url.removesuffix('v1')}\n"
        f"out       {Path(config.out).resolve()}\n"
        f"OpenClaw  in ~/.openclaw/openclaw.json (others: python -m clients.paste --help):\n"
        f"{paste.openclaw(url, config.name, key, config.max_model_len)}"
    )


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
