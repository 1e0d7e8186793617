"""Our speed against the obvious alternatives, measured alternately in one run:

    python -m evaluation.speed                  half an hour on two idle cores

- a training step next to TRL's AsyncGRPOTrainer, on the same samples (TRL is installed into a venv under --scratch)
- streams from run.py next to streams from vLLM's own server, with the same model and flags
- run.py while it trains next to run.py while it only serves; the pause of a swap next to a copy of the weights

All numbers go to docs/speed.json, from which docs/speed.md is written. Ratios are better if they are larger for tokens
per second, and smaller for times.
"""

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import tyro
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM

from durable.model import model_folder
from evaluation import speed_step
from evaluation.talk import wait_ready

ANSWERS = {1: 4, 8: 2, 32: 1}  # by number of streams, how many answers one of them gets in a round
TOKENS = 100
VLLM = (  # what the command `vllm serve` does: it isn't installed by the CPU build
    "import uvloop; from vllm.entrypoints.launchers.cli_args import make_arg_parser as parser\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser\n"
    "from vllm.entrypoints.launchers.api_server.entry import run_server\n"
    "if __name__ == '__main__': uvloop.run(run_server(parser(Parser()).parse_args()))\n"
)


@dataclass(frozen=True)
class Options:
    out: str = "docs"  # folder of speed.json and speed.md
    scratch: str = "/tmp/speed"  # for TRL's venv, logs and samples
    model: str = ""  # folder of the model; empty: the default of run.py
    rounds: int = 3  # how often each is measured, in turn
    only: str = "step,serve,train"  # parts to measure; the others stay as they are in speed.json


# ---- serving ----


@contextmanager
def running(command: list[str], log: Path, url: str) -> Iterator[subprocess.Popen]:
    """A server, from its first healthy answer to its end."""
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True)
    try:
        wait_ready(process, url, log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def servers(scratch: Path, model: str) -> dict[str, tuple[list[str], str]]:
    """Name -> command and address: run.py, and vLLM's server with the flags that run.py gives its engine."""
    common = {"max-model-len": 2048, "max-num-seqs": 64, "seed": 0}
    common |= {"kv-cache-memory-bytes": 1 << 30, "logprobs-mode": "processed_logprobs", "generation-config": "vllm"}
    (scratch / "serve.py").write_text(VLLM)
    theirs = [sys.executable, str(scratch / "serve.py"), f"--model={model}", "--served-model-name=policy"]
    theirs += ["--port=8871", "--enforce-eager", *[f"--{k}={v}" for k, v in common.items()]]
    out = scratch / f"out-{int(time.time())}"
    ours = [
        sys.executable,
        "run.py",
        f"--model={model}",
        f"--out={out}",
        "--port=8872",
        "--max_model_len=2048",
        "--engine_memory=1",
    ]
    return {"vLLM": (theirs, "http://127.0.0.1:8871"), "ours": (ours, "http://127.0.0.1:8872")}


@dataclass
class Load:
    """What streams get: times in seconds."""

    first: list[float]  # to the first token
    gaps: list[float]  # between tokens
    per_s: float = 0.0  # tokens of all streams


async def load(url: str, streams: int, answers: int) -> Load:
    client, found, begun = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600), Load([], []), time.time()

    async def stream(i: int) -> None:
        for k in range(answers):
            asked = time.perf_counter()
            said = f"Story number {i * 100 + k} about a {('cat', 'ship', 'tree', 'king')[k % 4]}, please."
            parts = await client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": said}],
                max_tokens=TOKENS,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            last = 0.0
            async for part in parts:
                if part.choices and part.choices[0].delta.content:
                    now = time.perf_counter()
                    (found.gaps if last else found.first).append(now - (last or asked))
                    last = now

    await asyncio.gather(*[stream(i) for i in range(streams)])
    found.per_s = streams * answers * TOKENS / (time.time() - begun)
    await client.close()
    return found


def summary(found: Load) -> dict[str, float]:
    return {
        "tokens/s": found.per_s,
        "first token, ms": 1e3 * statistics.median(found.first),
        "between tokens, ms": 1e3 * statistics.median(found.gaps),
        "between tokens, p95, ms": 1e3 * statistics.quantiles(found.gaps, n=20)[-1],
    }


async def measure_serving(o: Options, scratch: Path, model: str) -> dict[str, Any]:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0"  # as run.py does on two cores
    (theirs, their_url), (ours, our_url) = servers(scratch, model).values()
    log = scratch / "serve.log"
    with running(ours, log, our_url):
        dtype = re.search(r"serving and training in (\w+)", log.read_text())[1]
        with running([*theirs, f"--dtype={dtype}"], scratch / "vllm.log", their_url):
            return await measure_streams(o, their_url, our_url)


async def measure_streams(o: Options, their_url: str, our_url: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    await settled(our_url)
    for streams, answers in ANSWERS.items():
        found[str(streams)] = {"vLLM": [], "ours": []}
        for k in range(o.rounds + 1):
            for name, url in (("vLLM", their_url), ("ours", our_url)):
                measured = summary(await load(url, streams, answers))
                if k:  # the first round warms up
                    found[str(streams)][name].append(measured)
                    print(streams, name, measured, flush=True)
    return found


async def complain(client: AsyncOpenAI, number: int) -> None:
    """A conversation whose answer is judged and trained on."""
    said = [{"role": "user", "content": f"What is the number {number}?"}]
    reply = await client.chat.completions.create(model="policy", messages=said, max_tokens=40)
    said += [{"role": "assistant", "content": reply.choices[0].message.content}]
    said += [{"role": "user", "content": "No, much too long. Answer in one short sentence."}]
    await client.chat.completions.create(model="policy", messages=said, max_tokens=1)


async def settled(url: str) -> None:
    """Until a first turn is judged and trained on. At a model's first start the judge is fitted before, which takes a
    core for some time."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        await complain(client, 0)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while (await http.get("/status")).json()["turns"].keys() & {"judging", "queued", "training"}:
            await asyncio.sleep(1)


# ---- serving while training ----


@asynccontextmanager
async def probing(url: str) -> AsyncIterator[list[float]]:
    """GET /health every 10 ms while the block runs; yields the list of its times in seconds."""
    times: list[float] = []

    async def probe() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while True:
                begun = time.perf_counter()
                (await http.get("/health")).raise_for_status()
                times.append(time.perf_counter() - begun)
                await asyncio.sleep(0.01)

    task = asyncio.create_task(probe())
    yield times
    task.cancel()


async def keep_training(url: str, stop: asyncio.Event, pauses: dict[int, float]) -> None:
    """Complaints, so that there is always a step running. `pauses`: by step, the seconds of its swap."""
    client, k = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600), 0
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        before = (await http.get("/status")).json()["step"]
        while not stop.is_set():
            status = (await http.get("/status")).json()
            if status["step"] > before:
                pauses[status["step"]] = status["pause"][1] - status["pause"][0]
            if status["turns"].get("queued", 0) > 4:
                await asyncio.sleep(0.1)
            else:
                k += 1
                await complain(client, k)
    await client.close()


async def measure_training(o: Options, scratch: Path, model: str) -> dict[str, Any]:
    command, url = servers(scratch, model)["ours"]
    size = 2 * AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).num_parameters()
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    found: dict[str, Any] = {"bytes": size, "idle": [], "training": [], "pauses": [], "copies": []}
    with running(command, scratch / "train.log", url):
        await settled(url)
        await load(url, 4, 2)
        for _ in range(o.rounds):
            for what in ("idle", "training"):
                stop, pauses = asyncio.Event(), {}
                talking = asyncio.create_task(keep_training(url, stop, pauses)) if what == "training" else None
                async with probing(url) as times:
                    measured = summary(await load(url, 4, 5 if talking else 3))
                stop.set()
                if talking:
                    await talking
                    measured |= {"steps": len(pauses)}
                    found["pauses"] += pauses.values()
                await asyncio.sleep(5)
                measured |= {"health, p99.9, ms": 1e3 * statistics.quantiles(times, n=1000)[-1]}
                found[what].append(measured)
                print(what, measured, flush=True)
                for _ in range(5):
                    begun = time.perf_counter()
                    target.copy_(source)
                    found["copies"].append(time.perf_counter() - begun)
    return found


# ---- the table ----


def ratios(ours: list[float], theirs: list[float]) -> str:
    """Of the numbers measured in the same round: the median, the smallest and the largest."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| what | run.py | next to | its number | ratio: median (smallest to largest) |", "|---|---|---|---|---|"]

    def row(what: str, other: str, ours: list[float], theirs: list[float], digits: int = 1) -> None:
        a, b = (f"{statistics.median(values):.{digits}f}" for values in (ours, theirs))
        lines.append(f"| {what} | {a} | {other} | {b} | {ratios(ours, theirs)} |")

    for name, measured in found.get("step", {"batches": {}})["batches"].items():
        speeds = {
            who: [measured["trained tokens"] / s for s in measured[who]["seconds"]]
            for who in ("ours", "ours with the KL", "TRL")
        }
        unit = "trained tokens per CPU second"
        row(f"{name}: {unit}", "TRL's AsyncGRPOTrainer", speeds["ours"], speeds["TRL"], 0)
        row(f"{name}, with the KL: {unit}", "TRL's AsyncGRPOTrainer", speeds["ours with the KL"], speeds["TRL"], 0)
        row(f"{name}: peak memory, GiB", "TRL's AsyncGRPOTrainer", measured["ours"]["peak"], measured["TRL"]["peak"])
    for streams, measured in found.get("serve", {}).items():
        count = "1 stream" if streams == "1" else f"{streams} streams"
        for what in ("tokens/s", "first token, ms", "between tokens, ms"):
            ours, theirs = ([m[what] for m in measured[name]] for name in ("ours", "vLLM"))
            row(f"{count}: {what}", "vLLM's server", ours, theirs)
    if train := found.get("train"):
        for what in ("tokens/s", "between tokens, p95, ms", "health, p99.9, ms"):
            ours, idle = ([m[what] for m in train[name]] for name in ("training", "idle"))
            row(f"4 streams while it trains: {what}", "without training", ours, idle)
        pause, copy = statistics.median(train["pauses"]), statistics.median(train["copies"])
        size = f"{train['bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"| pause of a swap, ms | {1e3 * pause:.0f} | a copy of {size} | {1e3 * copy:.0f} | "
            f"{pause / copy:.1f} ({min(train['pauses']) / copy:.1f} to {max(train['pauses']) / copy:.1f}) |"
        )
    return "\n".join(lines) + "\n"


PAGE = """# Speed

    .venv/bin/python -m evaluation.speed

wrote this page from its measurements in `speed.json`: run.py and the obvious alternatives. The two sides of a row were
measured alternately in one run; different parts (`--only`) may be of different runs. CPU seconds are of one core. "With
the KL": the defaults of run.py; TRL has no KL by default. Peak memory leaves out our snapshot and starting weights.
TRL 1.16.0's AsyncGRPOTrainer shares prefixes as well.

"""


SHORT = """
On one core a token of SmolLM2-135M takes 30 to 55 ms of matrix products, which are bound by memory, and 30 ms of Python
and small kernels in vLLM's worker. In `vllm serve` on a CPU, the core process waits for the worker in a busy loop on
another core. In run.py that core is the trainer's, so the worker runs in the core process. Rows whose ratios range from
below 0.8 to above 1.2 say little: the two cores are threads of one, and other guests use the machine.
"""


def main(o: Options) -> None:
    scratch, out, model = Path(o.scratch), Path(o.out), str(model_folder(o.model))
    scratch.mkdir(parents=True, exist_ok=True)
    kept = out / "speed.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for part in o.only.split(","):
        if part == "step":
            found[part] = speed_step.measure(scratch, model, o.rounds)
        elif part == "serve":
            found[part] = asyncio.run(measure_serving(o, scratch, model))
        elif part == "train":
            found[part] = asyncio.run(measure_training(o, scratch, model))
        elif part:
            sys.exit(f"--only={o.only}: {part!r} is not one of step, serve, train")
        kept.write_text(json.dumps(found, indent=1) + "\n")
    (out / "speed.md").write_text(PAGE + table(found) + SHORT)
    print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
