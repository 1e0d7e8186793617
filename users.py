"""Scripted people who talk to the server as strangers would, and the measure of what it learned from them.

    python users.py                     start run.py, measure, talk until it has trained 15 steps, measure, draw
    python users.py --seed=1 --out=b    --key=value overrides the Setup below; any other --key goes to run.py

Each person has a preference that code can check and that they never state up front: they ask, read, and react in
words. Held-out questions are asked by nobody while it trains.
"""

import asyncio
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from tqdm import tqdm

STARTED = time.monotonic()


@dataclass(frozen=True)
class Setup:
    person: str = "brief"  # who talks: a key of PEOPLE
    steps: int = 15  # training steps
    seed: int = 0  # of the questions, the replies and the engine's sampler
    sessions: int = 16  # conversations at once
    held_out: int = 64  # questions of the measure before and after
    every: int = 5  # steps between the measures in between, on half of those questions
    max_tokens: int = 128  # the longest answer a person waits for
    out: str = "out"  # everything the run leaves
    port: int = 8000
    lr: float = 3e-5


@dataclass(frozen=True)
class Person:
    wants: str  # for the reader and the table; never sent
    pleased: Callable[[str], bool]
    thanks: tuple[str, ...]
    complaints: tuple[str, ...]


PEOPLE = {
    "brief": Person(
        wants="at most 80 words",
        pleased=lambda answer: 0 < len(answer.split()) <= 80,
        thanks=(
            "Perfect, thanks!",
            "Great, thank you.",
            "Thank you, nice and clear.",
            "Good answer, thanks.",
            "Exactly what I wanted, thank you.",
        ),
        complaints=(
            "That is too long. Please answer in one or two sentences.",
            "Too long, make it shorter please.",
            "That answer is too long for me. Say it in a sentence or two.",
            "This is far too long. Try again, short.",
            "Too many words. Please redo it, briefly.",
        ),
    ),
}

TOPICS = """
photosynthesis; gravity; inflation; a vaccine; the water cycle; an earthquake; a rainbow; magnetism; a black hole;
democracy; evaporation; the stock market; an ecosystem; friction; a volcano; electricity; the immune system; a comet;
the greenhouse effect; a computer virus; sound; natural selection; a solar eclipse; insulin; the internet; a glacier;
supply and demand; a hurricane; the seasons; osmosis; a battery; the moon's phases; yeast; an antibiotic; a tsunami;
recycling; a lighthouse; compound interest; the digestive system; a microscope; erosion; a telescope; plastic; steel;
a heart attack; wind power; a desert; migration of birds; the ozone layer; a nuclear reactor; the piano; a submarine;
fermentation; a transistor; an iceberg; the printing press; a thermometer; coral reefs; a satellite; bread; cheese;
the Roman Empire; the Renaissance; the Silk Road; a mortgage; a tax; a budget; an election; a constitution; jazz;
a sonnet; a novel; chess; a marathon; yoga; sleep; a dream; memory; stress; a habit; friendship; honesty; courage
""".replace("\n", " ").split(";")
FORMS = (
    "What is {}?",
    "Can you explain {} to me?",
    "Tell me about {}.",
    "Why does {} matter?",
    "I keep hearing about {}. What should I know?",
    "Could you describe {}?",
)

# Fixed texts on other matters: their log-likelihood shows what the training cost the model elsewhere.
UNRELATED = (
    "The train to the coast leaves at seven in the morning and arrives shortly before noon, with a change at the "
    "junction, where passengers may buy tea and sandwiches.",
    "def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total / len(values)",
    "To make the soup, fry the onions in butter until they are soft, add the potatoes and the stock, and let it "
    "simmer for half an hour before you blend it.",
    "The committee met on Tuesday to discuss the repair of the bridge. Two members asked for a second estimate, and "
    "the decision was postponed until the end of the month.",
    "Three children share twelve apples equally. Each child gets four apples. If one more child joins them, each of "
    "the four children gets three apples.",
    "She opened the letter slowly, afraid of what it might say. Her brother had written only two lines, but they "
    "were enough to make her sit down.",
    "Water boils at one hundred degrees Celsius at sea level, but at lower temperatures in the mountains, because "
    "the pressure of the air is lower there.",
    "Dear Sir or Madam, I am writing to complain about the washing machine that I bought in your shop last week. It "
    "makes a loud noise and does not spin.",
)


def questions() -> tuple[list[str], list[str]]:
    """(asked while it trains, held out): no topic is in both."""
    topics = [t.strip() for t in TOPICS]
    random.Random(0).shuffle(topics)
    cut = len(topics) * 2 // 3
    asked, held = ([form.format(t) for t in part for form in FORMS] for part in (topics[:cut], topics[cut:]))
    random.Random(1).shuffle(held)
    return asked, held


async def ask(client: AsyncOpenAI, messages: list[dict], max_tokens: int) -> str:
    reply = await client.chat.completions.create(model="policy", messages=messages, max_tokens=max_tokens)
    return reply.choices[0].message.content or ""


async def talk(client: AsyncOpenAI, person: Person, question: str, rng: random.Random, max_tokens: int) -> str:
    """One session: ask, read, react in words; the answer to the reaction is hardly read. Returns the first answer."""
    first = await ask(client, [{"role": "user", "content": question}], max_tokens)
    reaction = rng.choice(person.thanks if person.pleased(first) else person.complaints)
    talked = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": first},
        {"role": "user", "content": reaction},
    ]
    await ask(client, talked, 24)
    return first


async def measure(client: AsyncOpenAI, person: Person, held: list[str], max_tokens: int) -> dict[str, float]:
    """First replies to held-out questions (share that pleases, in percent; mean words), and what was paid for it:
    mean log-likelihood per token of unrelated texts, in nats."""
    limit = asyncio.Semaphore(32)

    async def first(question: str) -> str:
        async with limit:
            return await ask(client, [{"role": "user", "content": question}], max_tokens)

    answers = await asyncio.gather(*map(first, held))
    logps = []
    for text in UNRELATED:
        scored = await client.completions.create(
            model="policy", prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        logps += [next(iter(at.values()))["logprob"] for at in scored.choices[0].prompt_logprobs[1:]]
    return {
        "satisfied": 100 * sum(map(person.pleased, answers)) / len(answers),
        "words": sum(len(a.split()) for a in answers) / len(answers),
        "unrelated": sum(logps) / len(logps),
        "questions": len(held),
        "example": answers[0],
    }


async def converse(setup: Setup, url: str) -> dict[str, Any]:
    """Measure, talk, measure. The people hold back while a batch waits for the trainer: more would only grow stale."""
    person = PEOPLE[setup.person]
    asked, held = questions()
    rng = random.Random(setup.seed)
    measures: list[dict] = []
    firsts: list[tuple[int, bool, int]] = []  # (step when asked, pleased, words)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        status = (await http.get("/status")).json()
        bar = tqdm(total=setup.steps, unit="step", dynamic_ncols=True)

        async def measured(n: int) -> None:
            bar.set_description("measuring")
            measures.append({"step": status["step"]} | await measure(client, person, held[:n], setup.max_tokens))
            bar.set_description("talking")
            bar.set_postfix_str(f"held-out satisfied {measures[-1]['satisfied']:.0f} %")

        async def session(step: int) -> None:
            first = await talk(client, person, rng.choice(asked), rng, setup.max_tokens)
            firsts.append((step, person.pleased(first), len(first.split())))

        await measured(setup.held_out)
        talking: set[asyncio.Task] = set()
        while status["step"] < setup.steps:
            goal = min(setup.steps, (status["step"] // setup.every + 1) * setup.every)
            while status["step"] < goal:
                for task in [t for t in talking if t.done()]:
                    talking.remove(task)
                    task.result()  # an error in a session is an error of the run
                turns = status["turns"]
                unread = turns.get("judging", 0) + turns.get("queued", 0)
                if status["training"].startswith("stopped"):
                    raise RuntimeError(f"the server stopped training: {status['training']}")
                if len(talking) < setup.sessions and unread < status["batch_size"]:
                    talking.add(asyncio.create_task(session(status["step"])))
                    await asyncio.sleep(0.2)
                else:
                    await asyncio.sleep(1)
                status = (await http.get("/status")).json()
                bar.update(status["step"] - bar.n)
            await asyncio.gather(*talking)
            talking.clear()
            status = (await http.get("/status")).json()
            await measured(setup.held_out if goal == setup.steps else setup.held_out // 2)
        bar.close()
    return {"setup": dataclasses.asdict(setup), "measures": measures, "firsts": firsts}


def start_server(setup: Setup, extra: list[str]) -> subprocess.Popen:
    """run.py as a user would start it, its output in out/run.log."""
    out = Path(setup.out)
    if (out / "journal.db").exists():
        kept = out.with_name(f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        out.rename(kept)
        print(f"an earlier run was in {out}/, it is now in {kept}/")
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("run.py")), f"--out={setup.out}", f"--port={setup.port}"]
    command += [f"--seed={setup.seed}", f"--lr={setup.lr}", f"--steps={setup.steps}", "--max_model_len=2048", *extra]
    print("$", " ".join(["python", "run.py", *command[2:]]), f"> {out}/run.log", flush=True)
    with open(out / "run.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def wait_ready(server: subprocess.Popen, setup: Setup) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log = (Path(setup.out) / "run.log").read_text()
            sys.exit(f"run.py ended with {server.returncode}:\n{log[-3000:]}")
        try:
            if httpx.get(f"http://127.0.0.1:{setup.port}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    sys.exit(f"run.py did not answer in 600 s: see {setup.out}/run.log")


def table(result: dict[str, Any]) -> str:
    rows = ["step  questions  satisfied  mean words  log-likelihood of unrelated texts"]
    for m in result["measures"]:
        rows.append(
            f"{m['step']:4}  {m['questions']:9}  {m['satisfied']:7.1f} %  {m['words']:10.1f}  {m['unrelated']:.3f}"
        )
    return "\n".join(rows)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures, firsts = result["measures"], result["firsts"]
    person = PEOPLE[result["setup"]["person"]]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    steps = sorted({s for s, _, _ in firsts})
    share = [[p for s, p, _ in firsts if s == step] for step in steps]
    top.plot(steps, [100 * sum(p) / len(p) for p in share], color="tab:gray", alpha=0.6, label="in conversation")
    xs = [m["step"] for m in measures]
    top.plot(xs, [m["satisfied"] for m in measures], "o-", color="tab:blue", label="held-out questions")
    top.set(ylabel="first reply satisfies (%)", ylim=(0, 100))
    top.set_title(f"one person, who wants {person.wants} and never says so up front")
    top.legend(loc="lower right")
    bottom.plot(xs, [m["words"] for m in measures], "o-", color="tab:green")
    bottom.set(ylabel="mean words", xlabel="training steps (each 16 judged turns, then new weights)", ylim=(0, None))
    right = bottom.twinx()
    right.plot(xs, [m["unrelated"] for m in measures], "s--", color="tab:red")
    right.set_ylabel("log-likelihood of\nunrelated texts", color="tab:red")
    right.set_ylim(min(m["unrelated"] for m in measures) - 0.5, max(m["unrelated"] for m in measures) + 0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    fields = {f.name: f for f in dataclasses.fields(Setup)}
    values, extra = {}, []
    for arg in argv:
        name, given, text = arg.removeprefix("--").partition("=")
        if arg in ("--help", "-h"):
            print(__doc__)
            for f in fields.values():
                print(f"  --{f.name}={f.default}")
            return
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
    if setup.person not in PEOPLE:
        sys.exit(f"--person={setup.person}: expected one of {', '.join(PEOPLE)}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server is stopped too
    server = start_server(setup, extra)
    out = Path(setup.out)
    try:
        wait_ready(server, setup)
        result = asyncio.run(converse(setup, f"http://127.0.0.1:{setup.port}"))
        result["minutes"] = (time.monotonic() - STARTED) / 60
        (out / "result.json").write_text(json.dumps(result, indent=1))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    draw(result, out / "curve.png")
    print(f"\n{setup.person}: wants {PEOPLE[setup.person].wants}; seed {setup.seed}; {result['minutes']:.1f} minutes")
    print(table(result))
    print(f"\ndrawn in {out}/curve.png; every turn's row is in {out}/journal.db, every step's in {out}/metrics.jsonl")


if __name__ == "__main__":
    main(sys.argv[1:])
