"""Which samples may be trained on, and which weights served: a harmful step is reverted before its weights are served.

The bounds allow normal drift and catch collapse. In parentheses: values of a normal run.
"""

import json
import math
import sqlite3
from typing import Any

from durable.journal import NOTHING_TO_LEARN, UNREADABLE

DLOGP = 1.0  # mean |dlogp| of a batch, between the sampler and the trainer before the step
NLL_RISE = 0.5  # nats per token of the fixed text, against the starting weights (0.03 after 14 steps of the hybrid)
ENTROPY_CHANGE = 1.0  # nats per token of the fixed text, against the starting weights, up or down (0.15)
KL_JUMP = 0.25  # nats per token of the fixed text, to the starting weights, in one step (0.04 over all 14 steps)
REPEATED = 0.5  # share of repeated 4-grams in answers to the fixed prompts, unless the starting weights had more (0)
LENGTH = 1.5  # mean tokens of those answers, with the stop token: with fewer, the model says nothing (9 to 12)
IN_A_ROW = 3  # training stops after this many reverted steps in a row


class Refused(RuntimeError):
    """This step must not be served; the message says why."""


def reject_reason(turn: sqlite3.Row, chosen: list[sqlite3.Row], step: int, config: Any) -> str | None:
    """Why this turn is not trained on in a batch that already has `chosen`; None if it is.

    Turns are rows of `journal.queued`. `config`: a `config.Config`. Its shares bound the fraction of a batch that comes
    from one session, and from answers truncated by max_tokens.
    """
    try:
        versions = json.loads(turn["versions"])
        oldest, length = min(version for version, _, _ in versions), turn["prompt_tokens"] + versions[-1][2]
    except (ValueError, TypeError):
        return UNREADABLE
    if step - oldest > config.max_staleness:
        return f"stale: more than {config.max_staleness} steps old"
    if length > config.max_train_tokens:
        return f"longer than --max_train_tokens={config.max_train_tokens}"
    if not config.w_rl and turn["hints"] == "[]":
        return f"{NOTHING_TO_LEARN}: there is no hint, and the score is not trained on (w_rl is 0)"
    session, batch = (turn["user"], turn["session"]), [*chosen, turn]
    alike = {"session": sum((t["user"], t["session"]) == session for t in batch)}
    if turn["finish_reason"] == "length":
        alike["truncated"] = sum(t["finish_reason"] == "length" for t in batch)
    for what, count in alike.items():
        share = getattr(config, f"{what}_share")
        if count > share * config.batch_size:
            return f"over the share of a batch: {what}, {share:g}"
    return None


def check_batch(loss: float, grad_norm: float, dlogp: float) -> None:
    """Before Adam's step: Refused if loss or gradient is not finite, or sampler and trainer differ too much."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Refused(f"loss {loss:.3g}, gradient norm {grad_norm:.3g}")
    if not dlogp <= DLOGP:
        raise Refused(f"mean |dlogp| between sampler and trainer {dlogp:.2f} > {DLOGP}")


def check_weights(found: dict[str, float], first: dict[str, float], before: dict[str, float]) -> None:
    """After Adam's step, with `probe.measure` of the new weights, the starting weights and the weights before the step.

    Refused if the new ones are broken; each condition is written so that NaN fails it."""
    for fine, why in (
        (found["nll"] - first["nll"] <= NLL_RISE, "nll"),
        (abs(found["entropy"] - first["entropy"]) <= ENTROPY_CHANGE, "entropy"),
        (found["kl"] - before["kl"] <= KL_JUMP, "kl"),
        (found["repeated"] <= max(REPEATED, first["repeated"]), "repeated"),
        (found["length"] >= min(LENGTH, first["length"]), "length"),
    ):
        if not fine:
            raise Refused(
                f"on the probe, {why} is {found[why]:.2f}; before the step {before[why]:.2f}, first {first[why]:.2f}"
            )
