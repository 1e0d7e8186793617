"""Scripted people talk to the server as strangers would; the measure of what it learned from them.

    python users.py                              one person, the hybrid: start run.py, measure, talk, measure, draw
    python users.py --method=binary,opd,hybrid --person=one-sentence,ta --seed=0,1,2 --out=mine
                                                 a run each; stopped and started again, it goes on with the next one
    python users.py --person=student+ta+teacher  three people at once on one model

--key=value overrides the Setup below; any other --key goes to run.py. What was measured is in OUT/results.json; the
table and the picture are made from it each time, also when there is nothing left to run.
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
import textwrap
import time
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from tqdm import tqdm

from people import PEOPLE, UNRELATED, Person

METHODS = {"binary": ["--w_opd=0"], "opd": ["--w_rl=0"], "hybrid": []}  # arguments of run.py
STREAK = 3  # the paper's measure: sessions until this many in a row pleased with their first answer


@dataclass(frozen=True)
class Setup:
    person: str = "one-sentence"  # who talks; a comma: a run each; a plus: at once on one model
    method: str = "hybrid"  # binary, opd or hybrid; a comma: a run each
    seed: str = "0"  # of the questions, the replies and the engine's sampler; a comma: a run each
    talks: int = 40  # sessions in a run
    every: int = 20  # sessions between two measures
    at_once: int = 1  # sessions at the same time; 1: the next begins when all was learned that can be from the last
    held_out: int = 64  # questions of a measure
    max_tokens: int = 128  # the longest answer a person waits for
    temperature: float = 0.7  # that they ask for; at 1 a model of 135M parameters talks nonsense from the start
    out: str = "out"  # everything that a run leaves
    port: int = 8000  # of run.py
    user_url: str = ""  # an OpenAI-compatible endpoint that plays the people (key in USER_API_KEY); empty: scripted
    user_model: str = ""  # its model name


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


async def ask(client: AsyncOpenAI, messages: list[dict], max_tokens: int, temperature: float) -> tuple[str, bool]:
    """The answer, and whether it was cut off."""
    reply = await client.chat.completions.create(
        model="policy", messages=messages, max_tokens=max_tokens, temperature=temperature
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
        reply = await player.chat.completions.create(
            model=setup.user_model,
            messages=[{"role": "system", "content": role}, {"role": "user", "content": said}],
            max_tokens=80,
        )
    return reply.choices[0].message.content or ""


async def talk(client: AsyncOpenAI, setup: Setup, person: Person, rng: random.Random) -> dict[str, Any]:
    """One session: ask, read, react in words; the answer to the reaction is hardly read."""
    question, subject = person.asks(rng, False)
    first, _ = await ask(client, [{"role": "user", "content": question}], setup.max_tokens, setup.temperature)
    talked = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": first},
        {"role": "user", "content": await react(setup, person, question, subject, first, rng)},
    ]
    await ask(client, talked, 24, setup.temperature)
    return {"pleased": person.pleased(subject, first), "words": len(first.split())}


# ---- measuring ----


async def measure(client: AsyncOpenAI, setup: Setup, person: Person) -> dict[str, float]:
    """First replies to the same held-out questions each time: shares that please and are cut off, mean words."""
    rng, limit = random.Random(0), asyncio.Semaphore(32)

    async def first(question: str, subject: str) -> tuple[str, bool, bool]:
        async with limit:
            answer, cut = await ask(
                client, [{"role": "user", "content": question}], setup.max_tokens, setup.temperature
            )
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
    """Mean log-likelihood per token, in nats, of fixed answers to questions that nobody asked here.

    Without the tokens that end an answer: those get likelier in whoever learns to be brief.
    """
    total = tokens = 0

    async def score(messages: list[dict]) -> tuple[float, int]:
        whole = messages[-1]["role"] == "assistant"
        options = {"prompt_logprobs": 0, "add_generation_prompt": not whole, "continue_final_message": whole}
        scored = await client.chat.completions.create(
            model="policy", messages=messages, max_tokens=1, temperature=0, extra_body=options
        )
        logps = [next(iter(at.values()))["logprob"] for at in scored.prompt_logprobs[1:]]
        return sum(logps), len(logps)

    for question, answer in UNRELATED:
        asked = [{"role": "user", "content": question}]
        before, all_of_it = await score(asked), await score([*asked, {"role": "assistant", "content": answer}])
        total, tokens = total + all_of_it[0] - before[0], tokens + all_of_it[1] - before[1]
    return total / tokens


def sessions_to_effect(pleased: list[bool]) -> int | None:
    """Sessions until STREAK in a row were satisfied with their first answer (the streak included); None: never."""
    for i in range(STREAK, len(pleased) + 1):
        if all(pleased[i - STREAK : i]):
            return i
    return None


def by_chance(p: float) -> str:
    """The mean of `sessions_to_effect` for one who learns nothing and pleases with probability p."""
    if not p:
        return "never"
    n = STREAK if p == 1 else (1 - p**STREAK) / ((1 - p) * p**STREAK)
    return f"{n:.0f}" if n < 10_000 else "> 9999"


# ---- a run ----


async def converse(setup: Setup, run: Run, url: str, started: float) -> dict[str, Any]:
    """Measure, talk, measure. Nobody begins while a batch waits for the trainer: more would only grow stale. One at a
    time (`at_once` is 1) also waits for the step: a person's sessions are hours apart, a step takes seconds."""
    names = run.person.split("+")
    clients = {name: AsyncOpenAI(base_url=f"{url}/v1", api_key=f"{name}-key", timeout=600) for name in names}
    measures: list[dict] = []
    firsts: list[dict] = []  # in the order in which they were begun
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {names[0]}-key"}, timeout=60) as http:
        bar = tqdm(total=setup.talks, unit="session", desc="measuring", dynamic_ncols=True)

        async def now() -> tuple[dict, int]:
            """The server's status, and how many turns are on their way to the trainer."""
            status = (await http.get("/status")).raise_for_status().json()
            if firsts and status["training"] != "on":
                raise RuntimeError(f"the server does not train: {status['training']}")
            bar.set_postfix_str(f"step {status['step']}")
            turns = status["turns"]
            unread = turns.get("judging", 0) + turns.get("queued", 0)
            if setup.at_once == 1 and (turns.get("judging") or turns.get("training")):
                unread = max(unread, status["batch_size"])
            return status, unread

        async def measured() -> None:
            bar.set_description("measuring")
            step, lost = (await now())[0]["step"], await unrelated(clients[names[0]])
            for name in names:
                found = await measure(clients[name], setup, PEOPLE[name])
                when = {"talks": len(firsts), "step": step, "minutes": (time.monotonic() - started) / 60}
                measures.append({**when, "person": name, "unrelated": lost, **found})
                bar.write(f"after {len(firsts)} sessions, step {step}: {name} {100 * found['satisfied']:.0f} %")
            bar.set_description("talking")

        async def session(number: int, first: dict) -> None:
            rng = random.Random(f"{run.seed} {number}")  # the same questions whatever the timing
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
                status, unread = await now()
                if len(firsts) < goal and len(talking) < setup.at_once and unread < status["batch_size"]:
                    firsts.append({"person": names[len(firsts) % len(names)], "step": status["step"]})
                    talking.add(asyncio.create_task(session(len(firsts), firsts[-1])))
                await asyncio.sleep(0.2)
            status, unread = await now()
            while status["turns"].get("judging") or status["turns"].get("training") or unread >= status["batch_size"]:
                await asyncio.sleep(1)
                status, unread = await now()
            await measured()
        bar.close()
    for client in clients.values():
        await client.close()
    return {"measures": measures, "firsts": firsts}


def start_server(setup: Setup, run: Run, out: Path) -> subprocess.Popen:
    """run.py as a user would start it, its output in out/run.log."""
    keys = ",".join(f"{name}:{name}-key" for name in run.person.split("+"))
    command = [sys.executable, str(Path(__file__).with_name("run.py")), f"--out={out}", f"--port={setup.port}"]
    command += [f"--key={keys}", f"--seed={run.seed}", "--max_model_len=2048"]
    command += [*METHODS[run.method], *run.extra]
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
    """One run from its start to its last measure."""
    started, out, url = time.monotonic(), Path(setup.out) / run.folder, f"http://127.0.0.1:{setup.port}"
    try:  # else we would talk to whoever is there
        socket.create_server(("127.0.0.1", setup.port)).close()
    except OSError as e:
        sys.exit(f"--port={setup.port}: {e.strerror}")
    shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off
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
    metrics = out / "metrics.jsonl"  # not there where nothing was learned from
    steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return dataclasses.asdict(run) | {"label": run.label, "steps": steps} | result


# ---- showing ----


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval by Student's t, of up to ten seeds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[len(values)]
    return f"{statistics.mean(values):.1f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row for each method and person over the seeds, after as many sessions as all with that person had."""
    lines = [
        "| method | person | seeds | sessions | sessions to effect | by chance | held-out before, % | after, % | "
        "log-lik. unrelated, change | KL to start, fixed text | words | cut off, % | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    upto = {
        p: min(r["measures"][-1]["talks"] for r in results if r["person"] == p) for p in {r["person"] for r in results}
    }
    key = lambda r: (r["person"], r["label"])  # noqa: E731
    percent = lambda ms, what: interval([100 * m[what] for m in ms])  # noqa: E731
    words = lambda ms: f"{statistics.mean(m['words'] for m in ms):.0f}"  # noqa: E731
    for (people, label), group in groupby(sorted(results, key=key), key):
        runs = list(group)
        for name in people.split("+"):
            measured = [[m for m in r["measures"] if m["person"] == name and m["talks"] <= upto[people]] for r in runs]
            first, last = [ms[0] for ms in measured], [ms[-1] for ms in measured]
            talked = [[f for f in r["firsts"][: upto[people]] if f["person"] == name] for r in runs]
            effect = [sessions_to_effect([f["pleased"] for f in firsts]) for firsts in talked]
            reached = (
                interval([e for e in effect if e]) if all(effect) else f"{effect.count(None)}x over {len(talked[0])}"
            )
            kl = [s["probe_kl"] for r, m in zip(runs, last, strict=True) for s in r["steps"] if s["step"] == m["step"]]
            lost = [b["unrelated"] - a["unrelated"] for a, b in zip(first, last, strict=True)]
            lines.append(
                f"| {label} | {name}{' (jointly)' if '+' in people else ''} | {len(runs)} | {upto[people]} | "
                f"{reached} | "
                f"{by_chance(statistics.mean(m['satisfied'] for m in first))} | "
                f"{percent(first, 'satisfied')} | {percent(last, 'satisfied')} | "
                f"{statistics.mean(lost):+.3f} | {f'{statistics.mean(kl):.3f}' if kl else '-'} | "
                f"{words(first)} to {words(last)} | {percent(last, 'truncated')} | "
                f"{statistics.mean(m['minutes'] for m in last):.0f} |"
            )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out satisfaction of each run over its sessions, and below it what the steps did."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {
        "kl": "KL on the batch",
        "nll": "-log π of samples",
        "length": "tokens",
        "repeated": "repeated",
        "dlogp": "|Δlogp|",
    }
    people = sorted({m["person"] for r in results for m in r["measures"]})
    labels = sorted({r["label"] for r in results})
    figure = plt.figure(figsize=(max(7, 4 * len(people)), 7))
    top, bottom = figure.add_gridspec(2, 1, height_ratios=(2, 1))
    axes = top.subgridspec(1, len(people)).subplots(squeeze=False)[0]
    for axis, name in zip(axes, people, strict=True):
        for r in (r for r in results if name in r["person"].split("+")):
            mine = [m for m in r["measures"] if m["person"] == name]
            jointly = "+" in r["person"]  # then the sessions are those of all of them together
            line, label = ("o:", r["label"] + " (jointly)") if jointly else ("o-", r["label"])
            shown = dict(color=f"C{labels.index(r['label'])}", alpha=0.8, label=label)
            axis.plot([m["talks"] for m in mine], [100 * m["satisfied"] for m in mine], line, **shown)
        axis.set(title=textwrap.fill(f"wants {PEOPLE[name].wants}", 32), ylim=(0, 103), xlabel="sessions")
        of_label = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        axis.legend(of_label.values(), of_label.keys(), loc="upper left", fontsize=7)
    axes[0].set_ylabel("held-out first answers\nthat satisfy (%)")
    for axis, (name, title) in zip(
        bottom.subgridspec(1, len(curves), wspace=0.5).subplots(), curves.items(), strict=True
    ):
        for r in results:
            ys = [s[name] for s in r["steps"]]
            axis.plot(range(1, len(ys) + 1), ys, color=f"C{labels.index(r['label'])}", alpha=0.6)
        axis.set_title(title, fontsize=8)
        axis.set_ylim(0)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse(argv: list[str]) -> tuple[Setup, list[Run]]:
    """SystemExit names what is wrong."""
    fields = {f.name: f for f in dataclasses.fields(Setup)}
    values, extra = {}, []
    for arg in argv:
        name, given, text = arg.removeprefix("--").partition("=")
        if arg in ("--help", "-h"):
            print(__doc__)
            meaning = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.MULTILINE))
            for f in fields.values():
                print(f"{f'  --{f.name}={f.default}':<26} {meaning[f.name]}")
            sys.exit(0)
        if not arg.startswith("--") or not given:
            sys.exit(f"{arg!r}: expected --key=value; python users.py --help lists the keys")
        if name not in fields:
            extra.append(arg)  # run.py knows whether it exists
            continue
        try:
            values[name] = fields[name].type(text)
        except ValueError:
            sys.exit(f"--{name}={text}: expected {fields[name].type.__name__}")
    setup = Setup(**values)
    for name, known in (("person", PEOPLE), ("method", METHODS)):
        for part in getattr(setup, name).replace("+" if name == "person" else ",", ",").split(","):
            if part not in known:
                sys.exit(f"--{name}={getattr(setup, name)}: {part!r} is not one of {', '.join(known)}")
    if not all(s.isdigit() for s in setup.seed.split(",")):
        sys.exit(f"--seed={setup.seed}: expected whole numbers, comma-separated")
    cells = product(setup.seed.split(","), setup.person.split(","), setup.method.split(","))
    return setup, [Run(m, p, int(s), tuple(extra)) for s, p, m in cells]


def main(argv: list[str]) -> None:
    setup, runs = parse(argv)
    out = Path(setup.out)
    file = out / "results.json"
    cells = ("person", "method", "seed", "talks", "out", "port")
    settings = {k: v for k, v in dataclasses.asdict(setup).items() if k not in cells}
    results = json.loads(file.read_text()) if file.exists() else []
    if any(r["settings"] != settings for r in results):
        sys.exit(f"{file} was measured with other settings, {results[0]['settings']}: give another --out")
    done = {(r["label"], r["person"], r["seed"]) for r in results}
    left = [run for run in runs if (run.label, run.person, run.seed) not in done]
    if len(left) < len(runs):
        print(
            f"{len(runs) - len(left)} of {len(runs)} runs are in {file} already; give another --out to run them again"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server is stopped too
    minutes: list[float] = []
    for i, run in enumerate(left):
        estimate = f", about {statistics.mean(minutes) * (len(left) - i):.0f} minutes left" if minutes else ""
        print(f"run {i + 1} of {len(left)}: {run.label}, {run.person}, seed {run.seed}{estimate}", flush=True)
        results.append(perform(setup, run) | {"settings": settings})
        minutes.append(results[-1]["measures"][-1]["minutes"])
        file.with_suffix(".part").write_text(json.dumps(results, indent=1))
        file.with_suffix(".part").replace(file)
    draw(results, out / "curve.png")
    print(f"\n{table(results)}\n\ndrawn in {out}/curve.png; beside it, in a folder each, the runs' journals and logs")


if __name__ == "__main__":
    main(sys.argv[1:])
