"""The judge: it scores an answer good / bad / neutral from the message that follows it, and extracts a hint.

A model too small to follow instructions judges by a linear head on its frozen starting weights, fitted at startup on
replies/fit.jsonl (`HeadJudge`); the hints are the user's own words. A model that follows instructions is asked in chat,
and writes a rule as the hint: chat_judge.py.

To measure the judge's accuracy: python -m evaluation.judge_accuracy
"""

import asyncio
import hashlib
import json
import re
import unicodedata
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clients.endpoint import JudgeError
from clients.sessions import words_of
from durable.atomic import replacing

VOTES = {"good": 1, "bad": -1, "neutral": 0}
HEAD_CHARS = 400  # characters of the next messages that the head reads
MIN_HINT, MAX_HINT = 11, 300  # characters in a hint (at least: see `width`)
MAX_PARTS = 5  # most candidate hints from one complaint, the whole complaint included
REPLIES = Path(__file__).parent / "replies"  # fit.jsonl, and unseen.jsonl to measure on
READ_AT_ONCE = 16  # labelled replies that are read in one forward pass
QUESTION = "Is the feedback positive, negative or neutral?"  # begins the head's prompt

# Filters for the user's own words as hints: orders to a judge, and pairs of opposite wishes.
ORDERS = re.compile(
    r"\b(judges?|grad(e|er|ing)s?|votes?|voting|scor(e|ing)s?|rat(e|ing) (this|every|it|all)|rewards?|verdicts?|"
    r"evaluat\w+|instructions?|ignore|disregard|developer|override|classify)\b|"
    r"\b(system|label)\s*[:：]|<\||</\w|\[/?(INST|SYS)",
    re.IGNORECASE,
)
SHORT = (
    r"\b((?<!too )(short|brief|concise)\w*|too (long|much|many)|(at most|under|no more than) \d+|"
    r"(in \d|one|two|three|single) (\w+ )?(sentence|line|word)s?)\b"
)
LONG = r"\b(too (short|brief)|(?<!too )(?<!how )long(er)?|detail\w*|at length|every step|write more|at least \d+)\b"
PLAIN = r"\b(no|not|without|don't) (\w+ ){0,3}(list|bullet|bold|table)|\bplain (text|sentences|paragraph)"
LISTS = r"\b(as|in|with|(?<!don't )use|make|give) (\w+ ){0,2}(list|bullet|bold|table)"
OPPOSITES = [(SHORT, LONG), (LONG, SHORT), (PLAIN, LISTS), (LISTS, PLAIN)]


# ---- the text that a judge reads ----


def cut(text: str, chars: int) -> str:
    """At most about `chars` characters: the beginning and the end, where requests, errors and verdicts usually are."""
    if len(text) <= chars:
        return text
    tail = chars // 3
    return f"{text[: chars - tail].rstrip()} [...] {text[len(text) - tail :].lstrip()}"


def defuse(text: str) -> str:
    """The text in one line, without anything that a chat template or `evidence` uses as a delimiter.

    `evidence` delimits parts by labels at line starts, so a single line can't open or close one; a label inside the
    line loses its colon. "<" before a letter or a sign could start a special token.
    """
    text = " / ".join(filter(None, map(str.strip, text.splitlines())))  # a regex would be quadratic in spaces
    text = re.sub(r"<(?=[A-Za-z/|｜!])|\[(?=/?(INST|SYS|TOOL_|AVAILABLE_TOOLS))", "‹", text)  # ｜: DeepSeek's
    return re.sub(r"(?i)\b(request|answer|user reply|tool output|vote|feedback)\s*[:：]", r"\1 -", text)


def evidence(request: str, answer: str, next_messages: list[dict], chars: int, bare: bool = False) -> str:
    """The text of a turn for the judge. The next messages matter most and get `chars` characters. Request and answer
    get a quarter of that each, or are left out if `bare`."""
    parts = [] if bare else [("Request", request, chars // 4), ("Answer", answer, chars // 4)]
    each = chars // max(1, len(next_messages))
    for message in next_messages:
        name = "Tool output" if message["role"] == "tool" else "User reply"
        parts.append((name, words_of(message), each))
    return "\n".join(f"{name}: {cut(defuse(text), budget)}" for name, text, budget in parts)


Scored = tuple[int, list[int], float]  # the score in {+1, 0, -1}, the votes, the judge's confidence


# ---- the head: a judge for a small model ----


@dataclass
class Head:
    """Multinomial logistic regression on standardised features: (D,) mean and std, (D, 3) weight, (3,) bias."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 3), in the order of VOTES."""
        return ((features - self.mean) / self.std @ self.weight + self.bias).softmax(-1)


def head_ids(tokenizer: PreTrainedTokenizerBase, request: str, next_messages: list[dict]) -> list[int]:
    """The head's prompt, as token ids: the request and the next messages, without the answer."""
    text = f"{QUESTION}\n\nRequest: {cut(defuse(request), HEAD_CHARS // 3)}\n"
    return tokenizer(f"{text}{evidence('', '', next_messages, HEAD_CHARS, bare=True)}\nFeedback:")["input_ids"]


@torch.no_grad()
def features(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """The head's features of B prompts: hidden states of the frozen starting weights, at half and two thirds of the
    depth, each at the last token and averaged over all tokens. (B, D) fp32 on the CPU, D = 4 x the hidden size"""
    longest = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=model.device)  # (B, L), padded right
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts], device=model.device)
    states = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    layers = states[len(states) // 2], states[len(states) * 2 // 3]  # (B, L, D / 4) each
    found = [
        torch.cat([part for layer in layers for part in (layer[i, len(p) - 1], layer[i, : len(p)].mean(0))])
        for i, p in enumerate(prompts)
    ]
    return torch.stack(found).float().cpu()


def fit_head(x: Tensor, labels: Tensor, l2: float = 100.0) -> Head:
    """Fit a head to x (N, D), labels (N,) in 0..2. The problem is convex: LBFGS finds its minimum in about a second."""
    mean, std = x.mean(0), x.std(0) + 1e-3
    z = (x - mean) / std
    weight, bias = torch.zeros(x.shape[1], 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(z @ weight + bias, labels) + l2 * weight.square().sum() / len(labels)
        value.backward()
        return value

    optimizer.step(loss)
    return Head(mean, std, weight.detach(), bias.detach())


def labelled(name: str) -> list[dict]:
    """The rows of replies/NAME.jsonl: request, answer, next messages, label, kind."""
    return [json.loads(line) for line in (REPLIES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Path, stopping: Event) -> Head:
    """The head for a model. The features of the labelled replies take minutes on one core, so they are cached in a file
    named after `cache`, which must identify the model, and a hash of the replies and the prompt. InterruptedError if
    `stopping` is set meanwhile."""
    rows = labelled("fit")
    # The 1 is the version of the code of `head_ids` and `features`: raise it when that code changes.
    source = (REPLIES / "fit.jsonl").read_bytes() + f"{QUESTION} {HEAD_CHARS} 1".encode()
    cache = cache.with_name(f"{cache.name}-{hashlib.sha256(source).hexdigest()[:16]}.pt")
    if cache.exists():
        x = torch.load(cache, weights_only=True)
    else:
        print(f"judge     reads {len(rows)} labelled replies, once for this model", flush=True)
        prompts = [head_ids(tokenizer, row["request"], row["next"]) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # so that little is padded
        read: dict[int, Tensor] = {}
        for at in range(0, len(rows), READ_AT_ONCE):
            if stopping.is_set():
                raise InterruptedError("the program is stopping")
            batch = order[at : at + READ_AT_ONCE]
            read |= dict(zip(batch, features(model, [prompts[i] for i in batch]), strict=True))
        x = torch.stack([read[i] for i in range(len(rows))])  # (N, D)
        try:
            with replacing(cache) as part:
                torch.save(x, part)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
            print(f"judge     {cache} can't be written, so the next start reads them again: {e}", flush=True)
    return fit_head(x, torch.tensor([list(VOTES).index(r["label"]) for r in rows]))


def head_verdict(
    head: Head, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: str, next_messages: list[dict]
) -> Scored:
    """The most likely score, that score as the only vote, and its probability."""
    p = head.probabilities(features(model, [head_ids(tokenizer, request, next_messages)])[0])
    score = list(VOTES.values())[int(p.argmax())]
    return score, [score], p.max().item()


@dataclass
class HeadJudge:
    """The judge for a small model: a head on its frozen starting weights, and the user's own words as hints.

    `fitting`: the head, once it is fitted. `threads`: the executor that runs the model, off the event loop."""

    fitting: Future[Head]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    threads: Executor
    hinted_by = "own words"

    async def score(self, request: str, answer: str, next_messages: list[dict]) -> Scored:
        """JudgeError if the head could not be fitted. Only a restart tries to fit it again."""
        try:
            head = await asyncio.wrap_future(self.fitting)
        except Exception as e:
            raise JudgeError(f"its head could not be fitted (fix this, then restart): {type(e).__name__}: {e}") from e
        run = self.threads.submit(head_verdict, head, self.model, self.tokenizer, request, next_messages)
        return await asyncio.wrap_future(run)

    async def hints(self, request: str, answer: str, next_messages: list[dict]) -> list[str]:
        return own_words(request, next_messages)


# ---- hints ----


def width(text: str) -> int:
    """Length in characters. A Chinese, Japanese or Korean one counts twice, as it carries more meaning."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def own_words(request: str, next_messages: list[dict]) -> list[str]:
    """Candidate hints if the judge is too small to write one: the user's whole complaint, and its parts.

    "No, much too long. Redo it as one short sentence." replies to an answer, but its part "Redo it as one short
    sentence." could have been said before it. `distill.teacher_logps` uses the one with the most effect. [] for a
    tool's output, for orders to a judge, and for a wish that contradicts the request.
    """
    if next_messages[-1].get("role") != "user":
        return []
    said = words_of(next_messages[-1]).strip()
    if width(said) < MIN_HINT or len(said) > MAX_HINT:
        return []

    def wishes(text: str, one: str, other: str) -> bool:
        return bool(re.search(one, text, re.I)) and not re.search(other, text, re.I)

    contrary = any(wishes(request, a, b) and wishes(said, b, a) for a, b in OPPOSITES)
    if ORDERS.search(said) or contrary:
        return []
    parts = [said, *re.split(r"(?<=[.!?;])\s+|(?<=[。！？；])\s*(?=.)", said)]
    parts += [tail for part in parts[1:] for tail in re.split(r"[:,]\s+", part, maxsplit=1)[1:]]
    return [part for part in dict.fromkeys(parts) if width(part) >= MIN_HINT][:MAX_PARTS]
