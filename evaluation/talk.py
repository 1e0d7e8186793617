"""Scripted people talk to the server like any client, and what it learns from them is measured.

    python -m evaluation.talk                         one person, the hybrid: start run.py, measure, talk, measure, draw
    python -m evaluation.talk --method=binary,opd,hybrid --person=one-sentence,ta --seed=0,1,2 --out=mine
                                                 a run for each combination; after a stop, the same command continues
    python -m evaluation.talk --person=student+ta+teacher  three people at once on one model

--key=value overrides the Setup below; any other --key goes to run.py. The results are in OUT/results.json. Table and
picture are made from them each time, even if there is nothing left to run.
"""

import asyncio
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import tyro
from openai import AsyncOpenAI
from tqdm import tqdm

from clients.keys import ADMIN, write_private
from clients.sessions import without_thinking
from durable.atomic import replacing
from evaluation import report
from evaluation.people import PEOPLE, UNRELATED, Person

METHODS = {"binary": ["--w_opd=0"], "opd": ["--w_rl=0"], "hybrid": []}  # arguments of run.py


@dataclass(frozen=True)
class Setup:
    person: str = "one-sentence"  # who talks; with commas: a run each; with a plus: together on one model
    method: str = "hybrid"  # binary, opd or hybrid; with commas: a run each
    seed: str = "0"  # of the questions, the replies and the engine's sampler; with commas: a run each
    talks: int = 40  # sessions in a run
    every: int = 20  # sessions between two measurements
    at_once: int = 1  # sessions at the same time; 1: each begins when the step on the previous one is done
    held_out: int = 64  # questions in a measurement
    max_tokens: int = 128  # most tokens in a first answer
    temperature: float = 0.7  # of the requests; at 1, a model of 135M parameters talks nonsense from the start
    out: str = "out"  # folder for all files of the runs
    port: int = 8000  # of run.py
    user_url: str = ""  # an OpenAI-compatible endpoint that plays the people (key in USER_API_KEY); empty: scripted
    user_model: str = ""  # its model name

    def __post_init__(self) -> None:
        """ValueError names the invalid option."""
        for name, known in (("person", PEOPLE), ("method", METHODS)):
            for part in getattr(self, name).replace("+" if name == "person" else ",", ",").split(","):
                if part not in known:
                    raise ValueError(f"--{name}={getattr(self, name)}: {part!r} is not one of {', '.join(known)}")
        if not all(s.isdigit() for s in self.seed.split(",")):
            raise ValueError(f"--seed={self.seed}: expected whole numbers, comma-separated")
        for name in ("talks", "every", "at_once", "held_out", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: expected at least 1")


@dataclass(frozen=True)
class Run:
    """One cell of the table."""

    method: str
    person: str
    seed: int
    extra: tuple[str, ...]  # more arguments of run.py

    @property
    def label(self) -> str:
        return " ".join([self.method, *(arg.removeprefix("--") for arg in self.extra)])

    @property
    def folder(self) -> str:
        return f"{self.label.replace(' ', ',')}-{self.person}-{self.seed}".replace("/", "_")


# ---- talking ----


async def ask(client: AsyncOpenAI, setup: Setup, messages: list[dict], last: bool = False) -> tuple[str, bool]:
    """The answer, and whether it was truncated. `last`: the session ends, so one token will do, nobody looks at it, and
    the server won't wait for a reply."""
    reply = await client.chat.completions.create(
        model="policy",
        messages=messages,
        max_tokens=1 if last else setup.max_tokens,
        temperature=setup.temperature,
        extra_headers={"X-Session-Done": "1"} if last else {},
    )
    return reply.choices[0].message.content or "", reply.choices[0].finish_reason == "length"


async def react(setup: Setup, person: Person, question: str, subject: str, answer: str, rng: random.Random) -> str:
    """What the person says to an answer: by script, or by a model that plays them."""
    if not setup.user_url:
        return person.reaction(subject, answer, rng)
    role = (
        f"You asked an assistant a question. You like {person.wants}. Read the answer and reply to the assistant in "
        "one or two short sentences: thank it where the answer is as you like it, else complain and say what you want."
    )
    said = f"Your question: {question}\n\nThe answer: {answer}\n\nYour reply:"
    async with AsyncOpenAI(base_url=setup.user_url, api_key=os.environ.get("USER_API_KEY", "none")) as player:
        for _ in range(3):
            reply = await player.chat.completions.create(
                model=setup.user_model,
                messages=[{"role": "system", "content": role}, {"role": "user", "content": said}],
                max_completion_tokens=1024,  # it may think first
            )
            reaction = without_thinking(reply.choices[0].message.content or "").strip()
            if reaction and reply.choices[0].finish_reason != "length":
                return reaction
    raise RuntimeError(f"--user_model={setup.user_model} said nothing, or too much: {reply.choices[0]}")


async def talk(client: AsyncOpenAI, setup: Setup, person: Person, rng: random.Random) -> dict[str, Any]:
    """One session: ask, read, react in words."""
    question, subject = person.asks(rng, False)
    asked = [{"role": "user", "content": question}]
    first, _ = await ask(client, setup, asked)
    reaction = await react(setup, person, question, subject, first, rng)
    talked = [*asked, {"role": "assistant", "content": first}, {"role": "user", "content": reaction}]
    await ask(client, setup, talked, last=True)
    return {"pleased": person.pleased(subject, first), "words": len(first.split())}


# ---- measuring ----


async def measure(client: AsyncOpenAI, setup: Setup, person: Person) -> dict[str, float]:
    """Ask the same held-out questions each time: the fractions of answers that please and that are truncated, and mean
    words."""
    rng, limit = random.Random(0), asyncio.Semaphore(64)

    async def first(question: str, subject: str) -> tuple[str, bool, bool]:
        async with limit:
            answer, cut = await ask(client, setup, [{"role": "user", "content": question}])
            return answer, cut, person.pleased(subject, answer)

    n = setup.held_out
    answers = await asyncio.gather(*[first(*person.asks(rng, True)) for _ in range(n)])
    return {
        "satisfied": sum(pleased for _, _, pleased in answers) / n,
        "words": sum(len(answer.split()) for answer, _, _ in answers) / n,
        "truncated": sum(cut for _, cut, _ in answers) / n,
        "questions": n,
        "examples": [answer for answer, _, _ in answers[:4]],
    }


async def unrelated(client: AsyncOpenAI) -> float:
    """Mean log-likelihood per token, in nats, of fixed answers to unrelated questions.

    The end-of-answer tokens don't count: a model that learns to be brief makes them more likely.
    """

    async def score(messages: list[dict]) -> tuple[float, int]:
        whole = messages[-1]["role"] == "assistant"
        options = {"prompt_logprobs": 0, "add_generation_prompt": not whole, "continue_final_message": whole}
        scored = await client.chat.completions.create(
            model="policy", messages=messages, max_tokens=1, temperature=0, extra_body=options
        )
        logps = [next(iter(at.values()))["logprob"] for at in scored.prompt_logprobs[1:]]
        return sum(logps), len(logps)

    asked = [[{"role": "user", "content": question}] for question, _ in UNRELATED]
    answered = [[*a, {"role": "assistant", "content": answer}] for a, (_, answer) in zip(asked, UNRELATED, strict=True)]
    before = await asyncio.gather(*map(score, asked))
    all_of_it = await asyncio.gather(*map(score, answered))
    logp, tokens = (sum(part) for part in zip(*all_of_it, strict=True))
    logp_before, tokens_before = (sum(part) for part in zip(*before, strict=True))
    return (logp - logp_before) / (tokens - tokens_before)


# ---- a run ----


async def converse(setup: Setup, run: Run, url: str, started: float) -> dict[str, Any]:
    """Measure, talk, measure. No session begins while a batch waits for the trainer: more turns would only get stale.
    With `at_once` = 1 it also waits for the step: a person's sessions are hours apart, and a step takes seconds."""
    names = run.person.split("+")
    clients = {name: AsyncOpenAI(base_url=f"{url}/v1", api_key=f"{name}-key", timeout=600) for name in names}
    measures: list[dict] = []
    firsts: list[dict] = []  # sessions with the person's verdict on the first answer, in the order of their starts
    admin_key = (Path(setup.out) / run.folder / ADMIN).read_text().strip()
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        bar = tqdm(total=setup.talks, unit="session", desc="measuring", dynamic_ncols=True)

        async def status_for(key: str) -> dict:
            reply = await http.get("/status", headers={"Authorization": f"Bearer {key}"})
            return reply.raise_for_status().json()

        async def now() -> tuple[dict, bool, bool]:
            """The server's status, whether a whole batch waits in it, and whether it is judging or training."""
            status = await status_for(admin_key)
            if firsts and status["training"] != "on":
                raise RuntimeError(f"the server does not train: {status['training']}")
            bar.set_postfix_str(f"step {status['step']}")
            turns = Counter(status["turns"])
            has_batch = turns["judging"] + turns["queued"] >= status["batch_size"]
            return status, has_batch, turns["judging"] + turns["training"] > 0

        async def measured() -> None:
            bar.set_description("measuring")
            for name in names:
                lost = await unrelated(clients[name])
                step = (await status_for(f"{name}-key"))["step"]  # of the weights that answer this person
                found = await measure(clients[name], setup, PEOPLE[name])
                when = {"talks": len(firsts), "step": step, "minutes": (time.monotonic() - started) / 60}
                measures.append({**when, "person": name, "unrelated": lost, **found})
                bar.write(f"after {len(firsts)} sessions, step {step}: {name} {100 * found['satisfied']:.0f} %")
            bar.set_description("talking")

        async def session(number: int, first: dict) -> None:
            rng = random.Random(f"{run.seed} {number}")  # the same questions, whatever the timing
            first |= await talk(clients[first["person"]], setup, PEOPLE[first["person"]], rng)
            bar.update()

        await measured()
        while len(firsts) < setup.talks:
            talking: set[asyncio.Task] = set()
            goal = min(setup.talks, len(firsts) + setup.every)
            while len(firsts) < goal or talking:
                for task in [t for t in talking if t.done()]:
                    talking.remove(task)
                    task.result()  # an error in a session is an error of the run
                status, has_batch, at_work = await now()
                wait = has_batch or (at_work and setup.at_once == 1)
                if len(firsts) < goal and len(talking) < setup.at_once and not wait:
                    firsts.append({"person": names[len(firsts) % len(names)], "step": status["step"]})
                    talking.add(asyncio.create_task(session(len(firsts), firsts[-1])))
                await asyncio.sleep(0.1)
            _, has_batch, at_work = await now()
            while has_batch or at_work:
                await asyncio.sleep(1)
                _, has_batch, at_work = await now()
            await measured()
        bar.close()
    for client in clients.values():
        await client.close()
    return {"measures": measures, "firsts": firsts}


def start_server(setup: Setup, run: Run, out: Path) -> subprocess.Popen:
    """Start run.py as a user would. Its output goes to out/run.log."""
    write_private(out / "keys", "".join(f"{name}:{name}-key\n" for name in run.person.split("+")))
    command = [sys.executable, str(Path(__file__).parent.parent / "run.py"), f"--out={out}", f"--port={setup.port}"]
    command += [f"--seed={run.seed}", "--max_model_len=2048", *METHODS[run.method], *run.extra]
    print("\n$", " ".join(["python", "run.py", *command[2:]]), f"> {out}/run.log", flush=True)
    with open(out / "run.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def wait_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"run.py ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    sys.exit(f"run.py did not answer in 600 s: see {log}")


def perform(setup: Setup, run: Run) -> dict[str, Any]:
    """One run, from its start to its last measurement."""
    started, out, url = time.monotonic(), Path(setup.out) / run.folder, f"http://127.0.0.1:{setup.port}"
    try:  # otherwise we would talk to another server
        socket.create_server(("127.0.0.1", setup.port)).close()
    except OSError as e:
        sys.exit(f"--port={setup.port}: {e.strerror}")
    shutil.rmtree(out, ignore_errors=True)  # left by a run that was cut off
    out.mkdir(parents=True)
    server = start_server(setup, run, out)
    try:
        wait_ready(server, url, out / "run.log")
        result = asyncio.run(converse(setup, run, url, started))
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # 2 GB
    metrics = out / "metrics.jsonl"  # missing if there was no step
    steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return dataclasses.asdict(run) | {"label": run.label, "steps": steps} | result


def parse(argv: list[str]) -> tuple[Setup, list[Run]]:
    """SystemExit names an invalid option. Options that `Setup` doesn't have go to run.py."""
    setup, extra = tyro.cli(Setup, args=argv, use_underscores=True, description=__doc__, return_unknown_args=True)
    for arg in extra:
        if not re.fullmatch(r"--\w+=.*", arg):
            sys.exit(f"{arg!r}: expected --name=value")
    cells = product(setup.seed.split(","), setup.person.split(","), setup.method.split(","))
    return setup, [Run(m, p, int(s), tuple(extra)) for s, p, m in cells]


def recorded(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def main(argv: list[str]) -> None:
    setup, runs = parse(argv)
    out = Path(setup.out)
    file = out / "results.json"
    cells = ("person", "method", "seed", "talks", "out", "port")
    settings = {k: v for k, v in dataclasses.asdict(setup).items() if k not in cells}
    results = recorded(file)
    if any(r["settings"] != settings for r in results):
        sys.exit(f"{file} was measured with other settings, {results[0]['settings']}: use another --out")
    done = {(r["label"], r["person"], r["seed"]) for r in results}
    left = [run for run in runs if (run.label, run.person, run.seed) not in done]
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs are in {file} already; use another --out to run them again")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server is stopped too
    minutes: list[float] = []
    for i, run in enumerate(left):
        estimate = f", about {statistics.mean(minutes) * (len(left) - i):.0f} minutes left" if minutes else ""
        print(f"run {i + 1} of {len(left)}: {run.label}, {run.person}, seed {run.seed}{estimate}", flush=True)
        result = perform(setup, run) | {"settings": settings}
        minutes.append(result["measures"][-1]["minutes"])
        results = [*recorded(file), result]  # read again: another command may have added its runs
        with replacing(file) as part:
            part.write_text(json.dumps(results, indent=1))
    report.draw(results, out / "curve.png")
    print(f"\n{report.table(results)}\n\npicture: {out}/curve.png; each run's log is in its folder in {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
