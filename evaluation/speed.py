"""Speed next to what a user would take instead, measured in turn in one run:

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
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
import tyro
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, PreTrainedModel

import grpo
import trainer
from config import Config
from durable.model import model_folder
from evaluation import prefixes
from evaluation.talk import wait_ready
from machine.plan import measure_gflops

PEER = (
    "trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 "
    "python-dateutil==4.0.0 pytz==2026.6 six==1.17.0 tzdata==2026.6 xxhash==4.1.0"
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STREAMS, TOKENS = (1, 8, 32), 100
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


# ---- a training step ----


def drawn(n: int, rng: random.Random) -> list[int]:
    return rng.choices(range(1000, 40000), k=n)


def prompts_with_answers(rng: random.Random) -> list[dict]:
    """8 prompts with 4 answers each, as GRPO samples them."""
    prompts = [drawn(rng.randrange(40, 62), rng) for _ in range(8)]
    return [
        {"prompt_ids": prompt, "response_ids": drawn(rng.randrange(16, 65), rng)} for prompt in prompts for _ in "abcd"
    ]


def conversation(rng: random.Random) -> list[dict]:
    """16 turns: each prompt is the one before, its answer and the next message."""
    rows, ids = [], []
    for _ in range(16):
        ids = ids + drawn(48, rng)
        rows.append({"prompt_ids": ids, "response_ids": drawn(16, rng)})
        ids = ids + rows[-1]["response_ids"]
    return rows


@torch.no_grad()
def sampler_logps(policy: PreTrainedModel, row: dict) -> list[float]:
    return grpo.response_logps(policy, grpo.alone(row["prompt_ids"], row["response_ids"], "cpu")).tolist()


def own_step(samples: str, model: str, dtype: str, kl: str) -> None:
    """Three steps of ours in this process; prints one line of JSON, as trl_step.py does."""
    torch.set_num_threads(1)
    lessons = []
    for s in json.load(open(samples)):
        turn = prefixes.lesson(s["prompt_ids"], s["response_ids"], []).turn
        lessons.append(trainer.Lesson(replace(turn, logprobs=s["logps"]), s["adv"], []))
    config = Config(row_tokens=256, batch_size=len(lessons), kl=float(kl), lr=1e-6)
    state = trainer.load_state(config, None, Path(model), "cpu", DTYPES[dtype])
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        trainer.update(config, state, lessons)
        seconds.append(time.process_time() - begun)
    held = sum(t.numel() * t.element_size() for t in [*state.kept, *state.start.parameters()]) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - held  # TRL has no snapshot and no start model
    print(json.dumps({"seconds": min(seconds[1:]), "peak": peak}))


def measure_step(o: Options, scratch: Path, model: str) -> dict[str, Any]:
    peer = scratch / "peer"
    if not (peer / "ready").exists():
        venv.create(peer, with_pip=True)
        (site,) = peer.glob("lib/python*/site-packages")
        (site / "project.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run([peer / "bin/pip", "install", "-q", "--no-deps", *PEER.split()], check=True)
        (peer / "ready").touch()
    gflops = measure_gflops(Path(model), [max(os.sched_getaffinity(0))], 256)
    dtype = "bf16" if gflops[torch.bfloat16] > gflops[torch.float32] else "fp32"  # for both, as run.py chooses
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[str, Any] = {"dtype": dtype, "GFLOP/s": gflops[DTYPES[dtype]], "batches": {}}
    for name, make in (("8 prompts x 4 answers", prompts_with_answers), ("16 turns of a conversation", conversation)):
        rng = random.Random(0)
        rows = [r | {"logps": sampler_logps(policy, r), "adv": rng.gauss(0, 1)} for r in make(rng)]
        samples = scratch / "samples.json"
        samples.write_text(json.dumps(rows))
        trained = sum(len(r["response_ids"]) for r in rows)
        own = [sys.executable, "-m", "evaluation.speed", "own_step", samples, model, dtype]
        commands = {
            "TRL": [peer / "bin/python", "evaluation/trl_step.py", samples, model, dtype],
            "ours": [*own, "0"],
            "ours with the KL": [*own, "0.1"],
        }
        results: dict[str, list[dict]] = {what: [] for what in commands}
        for _ in range(o.rounds):
            for what, command in commands.items():
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
                if done.returncode:
                    sys.exit(f"{what}: {done.stderr[-2000:]}")
                results[what].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, what, results[what][-1], flush=True)
        found["batches"][name] = {
            "trained tokens": trained,
            "tokens": sum(len(r["prompt_ids"]) for r in rows) + trained,
            **{what: {k: [r[k] for r in runs] for k in ("seconds", "peak")} for what, runs in results.items()},
        }
    return found


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
    common = {"max-model-len": 2048, "max-num-seqs": 64, "seed": 0, "dtype": "bfloat16"}
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
    found: dict[str, Any] = {}
    with running(theirs, scratch / "vllm.log", their_url), running(ours, scratch / "serve.log", our_url):
        await settled(our_url)
        for streams in STREAMS:
            found[str(streams)] = {"vLLM": [], "ours": []}
            for k in range(o.rounds + 1):
                for name, url in (("vLLM", their_url), ("ours", our_url)):
                    measured = summary(await load(url, streams, max(2, 16 // streams)))
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
        while not stop.is_set():
            status = (await http.get("/status")).json()
            if status["step"]:
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
                    measured = summary(await load(url, 4, 12 if talking else 6))
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
    lines = ["| what | ours | theirs | ratio: median (smallest to largest) |", "|---|---|---|---|"]

    def row(what: str, ours: list[float], theirs: list[float], form: str = "{:.1f}") -> None:
        a, b = (form.format(statistics.median(values)) for values in (ours, theirs))
        lines.append(f"| {what} | {a} | {b} | {ratios(ours, theirs)} |")

    for name, measured in found.get("step", {"batches": {}})["batches"].items():
        speed = lambda what: [measured["trained tokens"] / s for s in measured[what]["seconds"]]  # noqa: E731,B023
        for what in ("ours", "ours with the KL"):
            row(f"{name}: trained tokens per CPU second, {what}, theirs is TRL's", speed(what), speed("TRL"), "{:.0f}")
        row(f"{name}: peak memory, GiB", measured["ours"]["peak"], measured["TRL"]["peak"])
    for streams, measured in found.get("serve", {}).items():
        for what in ("tokens/s", "first token, ms", "between tokens, ms"):
            ours, theirs = ([m[what] for m in measured[name]] for name in ("ours", "vLLM"))
            row(f"{streams} streams: {what}, theirs is vLLM's server", ours, theirs)
    if train := found.get("train"):
        for what in ("tokens/s", "between tokens, p95, ms", "health, p99.9, ms"):
            ours, idle = ([m[what] for m in train[name]] for name in ("training", "idle"))
            row(f"4 streams while training, theirs is the same without training: {what}", ours, idle)
        pause, copy = statistics.median(train["pauses"]), statistics.median(train["copies"])
        size = f"{train['bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"| pause of a swap, ms, theirs is a copy of {size} | {1e3 * pause:.0f} | {1e3 * copy:.0f} | "
            f"{pause / copy:.1f} ({min(train['pauses']) / copy:.1f} to {max(train['pauses']) / copy:.1f}) |"
        )
    return "\n".join(lines) + "\n"


PAGE = """# Speed

    .venv/bin/{command}

wrote this page from its measurements in `speed.json`, next to what you would take instead, in turn in one run. CPU
seconds are of one core. "With the KL": the defaults of run.py; TRL has no KL by default. Peak memory leaves out our
snapshot and starting weights. TRL is 1.16.0's AsyncGRPOTrainer, which shares prefixes as well.

"""


def main(o: Options) -> None:
    scratch, out, model = Path(o.scratch), Path(o.out), str(model_folder(o.model))
    scratch.mkdir(parents=True, exist_ok=True)
    kept = out / "speed.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for part in o.only.split(","):
        if part == "step":
            found[part] = measure_step(o, scratch, model)
        elif part == "serve":
            found[part] = asyncio.run(measure_serving(o, scratch, model))
        elif part == "train":
            found[part] = asyncio.run(measure_training(o, scratch, model))
        elif part:
            sys.exit(f"--only={o.only}: {part!r} is not one of step, serve, train")
        kept.write_text(json.dumps(found, indent=1) + "\n")
    (out / "speed.md").write_text(PAGE.format(command=f"python -m evaluation.speed --only={o.only}") + table(found))
    print(table(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["own_step"]:
        own_step(*sys.argv[2:])
    else:
        main(tyro.cli(Options, description=__doc__))
