"""The training step of evaluation/speed.py: ours and TRL's on the same samples, each in a process of its own.

python -m evaluation.speed_step SAMPLES MODEL bf16|fp32 KL      our step; trl_step.py is TRL's
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import grpo
import trainer
from config import Config
from evaluation import prefixes
from machine.plan import measure_gflops

PEER = (
    "trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 "
    "python-dateutil==4.0.0 pytz==2026.6 six==1.17.0 tzdata==2026.6 xxhash==4.1.0"
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def faster_dtype(model: str) -> tuple[str, float]:
    """As run.py chooses it, and its GFLOP/s on one core."""
    gflops = measure_gflops(Path(model), [max(os.sched_getaffinity(0))], 256)
    name = max(DTYPES, key=lambda name: gflops[DTYPES[name]])
    return name, gflops[DTYPES[name]]


# ---- the samples ----


def prompts_with_answers() -> list[tuple[list[int], list[int]]]:
    """8 prompts with 4 answers each, as GRPO samples them."""
    prompts = [prefixes.drawn(random.randrange(40, 62)) for _ in range(8)]
    return [(prompt, prefixes.drawn(random.randrange(16, 65))) for prompt in prompts for _ in range(4)]


def conversation() -> list[tuple[list[int], list[int]]]:
    """16 turns: each prompt is the one before, its answer and the next message."""
    turns = [lesson.turn for lesson in prefixes.conversation(prefixes.Options(), shared=True)]
    return [(turn.prompt_ids, turn.response_ids) for turn in turns]


@torch.no_grad()
def sample(policy: PreTrainedModel, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    logps = grpo.response_logps(policy, grpo.single_row(prompt, answer, "cpu")).tolist()
    return {"prompt_ids": prompt, "response_ids": answer, "logps": logps, "adv": random.gauss(0, 1)}


# ---- the measurement ----


def measure(scratch: Path, model: str, rounds: int) -> dict[str, Any]:
    """CPU seconds and peak memory in GiB of both steps, by batch, in turn `rounds` times. TRL goes into a venv in
    `scratch`."""
    peer = scratch / "peer"
    if not (peer / "ready").exists():
        venv.create(peer, with_pip=True)
        (site,) = peer.glob("lib/python*/site-packages")
        (site / "project.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run([peer / "bin/pip", "install", "-q", "--no-deps", *PEER.split()], check=True)
        (peer / "ready").touch()
    dtype, gflops = faster_dtype(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[str, Any] = {"dtype": dtype, "GFLOP/s": gflops, "batches": {}}
    for name, make in (("8 prompts x 4 answers", prompts_with_answers), ("16 turns of a conversation", conversation)):
        random.seed(0)
        rows = [sample(policy, *turn) for turn in make()]
        file = scratch / "samples.json"
        file.write_text(json.dumps(rows))
        own = [sys.executable, "-m", "evaluation.speed_step", file, model, dtype]
        commands = {
            "TRL": [peer / "bin/python", "evaluation/trl_step.py", file, model, dtype],
            "ours": [*own, "0"],
            "ours with the KL": [*own, "0.1"],
        }
        results: dict[str, list[dict]] = {what: [] for what in commands}
        for _ in range(rounds):
            for what, command in commands.items():
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
                if done.returncode:
                    sys.exit(f"{what}: {done.stderr[-2000:]}")
                results[what].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, what, results[what][-1], flush=True)
        trained = sum(len(r["response_ids"]) for r in rows)
        found["batches"][name] = {
            "trained tokens": trained,
            "tokens": sum(len(r["prompt_ids"]) for r in rows) + trained,
            **{what: {k: [r[k] for r in runs] for k in ("seconds", "peak")} for what, runs in results.items()},
        }
    return found


def main(samples: str, model: str, dtype: str, kl: str) -> None:
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


if __name__ == "__main__":
    main(*sys.argv[1:])
