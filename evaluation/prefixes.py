"""What a step saves if turns share a prefix: tokens that go through the models, and CPU seconds. With random weights.

    python -m evaluation.prefixes           16 turns of a conversation in one step, and a turn with a hint

Each is compared with as many turns of the same lengths without common prefixes, which are computed separately.
"""

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import trainer
from config import Config
from durable.journal import Turn
from evaluation.memory import make_model
from trainer import Lesson, State


@dataclass(frozen=True)
class Options:
    model: str = "135M"  # a shape of evaluation/memory.py
    turns: int = 16  # in the conversation
    new: int = 64  # tokens that a turn adds, with its answer
    answer: int = 16  # tokens of an answer
    prompt: int = 2000  # tokens of the hinted turn's prompt
    hint: int = 30  # tokens of the hint, inserted 5 tokens before the end of the prompt
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def drawn(n: int) -> list[int]:
    return random.choices(range(1000, 40000), k=n)


def lesson(prompt: list[int], answer: list[int], hinted: list[list[int]]) -> Lesson:
    spans = [(0, 0, len(answer))]
    turn = Turn("", "", "", [], {}, "", "", "", "", "stop", prompt, answer, [-10.8] * len(answer), spans, 1.0)
    return Lesson(turn, -1.0, hinted)


def conversation(o: Options, shared: bool) -> list[Lesson]:
    """Each turn's prompt is the previous prompt, its answer and the next message."""
    lessons, before = [], []
    for k in range(o.turns):
        prompt = [*(before if shared else drawn(k * o.new)), *drawn(o.new - o.answer)]
        lessons.append(lesson(prompt, drawn(o.answer), []))
        before = prompt + lessons[-1].turn.response_ids
    return lessons


def hinted_turn(o: Options, shared: bool) -> list[Lesson]:
    prompt = drawn(o.prompt)
    hinted = [*prompt[:-5], *drawn(o.hint), *prompt[-5:]] if shared else drawn(o.prompt + o.hint)
    return [lesson(prompt, drawn(o.answer), [hinted])]


def measure(state: State, config: Config, lessons: list[Lesson]) -> tuple[int, float]:
    """Tokens that went through the policy and the starting weights in a step, and its CPU seconds."""
    seen = []
    hooks = [
        model.model.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for model in (state.policy, state.start)
    ]
    began = time.process_time()
    trainer.update(config, state, lessons)
    seconds = time.process_time() - began
    for hook in hooks:
        hook.remove()
    return sum(seen), seconds


def main(o: Options) -> None:
    random.seed(0)
    torch.set_num_threads(1)
    config = Config(row_tokens=256, max_model_len=16384)
    with tempfile.TemporaryDirectory() as folder:
        make_model(o.model, Path(folder))
        state = trainer.load_state(config, None, Path(folder), "cpu", getattr(torch, o.dtype))
    measure(state, config, [lesson(drawn(100), drawn(20), [])])  # warm up
    for name, make in (("a hinted turn", hinted_turn), (f"a conversation of {o.turns} turns", conversation)):
        alone, tree = (measure(state, config, make(o, shared)) for shared in (False, True))
        print(
            f"{name}: {alone[0]} tokens, {alone[1]:.1f} s alone; {tree[0]} tokens, {tree[1]:.1f} s as a tree: "
            f"{alone[0] / tree[0]:.1f}x fewer tokens, {alone[1] / tree[1]:.1f}x faster",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
