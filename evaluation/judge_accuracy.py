"""How often the judge agrees with the labels of replies/unseen.jsonl, which no judge was fitted to.

python -m evaluation.judge_accuracy                                                    the head
python -m evaluation.judge_accuracy --url=http://127.0.0.1:8000/v1 --model=NAME        a chat judge, any endpoint
"""

import asyncio
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from threading import Event
from typing import Literal

import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_judge import ChatJudge
from clients.endpoint import JudgeError, connect
from durable.errors import UsageError
from durable.model import CACHE, fingerprint, model_folder
from machine.plan import measure_gflops
from reward import VOTES, head_verdict, labelled, make_head


@dataclass(frozen=True)
class Options:
    url: str = ""  # OpenAI-compatible endpoint of a chat judge; empty: the head of a local model
    model: str = ""  # the endpoint's model name, or the head's model folder
    votes: int = 3  # of a chat judge whose endpoint gives no log-probs
    set: Literal["unseen", "fit"] = "unseen"  # which labelled replies to judge

    def __post_init__(self) -> None:
        if self.url and not self.model:
            raise ValueError("--url needs --model")
        if self.votes < 1:
            raise ValueError(f"--votes={self.votes}: expected at least 1")


def report(rows: list[dict], scores: list[int], seconds: float) -> None:
    """Print how often a judge agrees with the labels, by kind of reply and by label."""
    right = [score == VOTES[row["label"]] for row, score in zip(rows, scores, strict=True)]
    for kind in ("all", *sorted({row["kind"] for row in rows})):
        hits = [hit for hit, row in zip(right, rows, strict=True) if kind in ("all", row["kind"])]
        print(f"{kind:16}{sum(hits) / len(hits):7.1%}  {sum(hits)}/{len(hits)}")
    print(f"\n{'label / judged':16}" + "".join(f"{label:>9}" for label in VOTES))
    for label in VOTES:
        said = Counter(score for score, row in zip(scores, rows, strict=True) if row["label"] == label)
        print(f"{label:16}" + "".join(f"{said[vote]:9}" for vote in VOTES.values()))
    print(f"\n{len(rows)} verdicts in {seconds:.1f} s")


async def measure_chat(judge: ChatJudge, rows: list[dict]) -> list[int]:
    at_once = asyncio.Semaphore(4)

    async def one(r: dict) -> int:
        async with at_once:
            while True:
                try:
                    return (await judge.score(r["request"], r["answer"], r["next"]))[0]
                except JudgeError as e:
                    if not e.retry_after:
                        raise
                    await asyncio.sleep(e.retry_after)  # its rate limit

    return await asyncio.gather(*map(one, rows))


def main(options: Options) -> None:
    rows, began = labelled(options.set), time.perf_counter()
    if options.url:
        judge = ChatJudge(connect(options.url), options.model, votes=options.votes)
        scores = asyncio.run(measure_chat(judge, rows))
    else:
        folder = model_folder(options.model)
        gflops = measure_gflops(folder, sorted(os.sched_getaffinity(0)), 256)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=max(gflops, key=gflops.get)).eval()  # as in run.py
        tokenizer = AutoTokenizer.from_pretrained(folder)
        head = make_head(model, tokenizer, CACHE / "judge" / fingerprint(folder)[:16], Event())
        began = time.perf_counter()
        scores = [head_verdict(head, model, tokenizer, r["request"], r["next"])[0] for r in rows]
    report(rows, scores, time.perf_counter() - began)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (UsageError, JudgeError) as e:
        sys.exit(str(e))
