"""Why nothing is training, in one sentence."""

from collections import Counter
from typing import Any

from durable import journal

# Beginning of a drop reason -> its explanation
CAUSES = (
    (journal.NEUTRAL, "the next message said nothing about the answer (neutral)"),
    (journal.NO_REPLY, "no next message came"),
    (journal.NO_HINT, "it was sampled in a way that can't be trained on, and there is no hint"),
    ("side request", "it was a side request: the client's own, not a person's"),
    ("stale", "it was stale: its weights are too many steps old"),
    ("the judge failed", "the judge failed on it"),
    (journal.LEFT_OUT, "it was left out by hand"),
)


def number(n: int, things: str) -> str:
    """`things` in singular/plural: number(2, "answer waits/answers wait") is "2 answers wait"."""
    return f"{n} {things.split('/')[n != 1]}"


def why_nothing(now: dict[str, Any]) -> str:
    """What training waits for. `now`: what /web/events sends, see `page.glance`; one user's, or everybody's."""
    turns, training, size = now["turns"], now["training"], now["batch_size"]
    waiting, judging, queued = (turns.get(state, 0) for state in ("waiting", "judging", "queued"))
    wait = now["batch_wait"]
    if now["disk_full"] or training.startswith("waits: the disk is full"):
        return "The disk is full: nothing more can be recorded, so nothing is judged or trained on."
    if training.startswith("paused"):
        return f"Training is {training}. {number(queued, 'judged turn waits/judged turns wait')} for it."
    if training.startswith("stopped"):
        guard = " by the guard" if "in a row reverted" in training else ""
        return f"Training is stopped{guard}{training.removeprefix('stopped')}"
    if training == "off":
        return "Training has ended: --steps is reached."
    if now["stepping"]:
        return "A step is running."
    if now["judge_error"] and judging:
        return f"The judge is down, and {number(judging, 'turn waits/turns wait')} for it: {now['judge_error']}"
    if now["together"] >= size:
        return "The next step is about to begin."
    if paused := now.get("paused"):
        mine = number(queued, "judged turn waits/judged turns wait")
        return f"Training is paused or stopped for {', '.join(paused)}; {mine}."
    if queued:
        if now["user"] is None or now["owner"]:  # these are all the turns that a batch can contain
            soon = f" It starts without the rest if no turn comes for {wait:g} s." if wait else ""
            have = f"{now['together']} of {number(size, 'turn/turns')}"
            return f"Waiting for the batch: {have} until the next step.{soon}"
        mine = f"{now['user']} has {number(queued, 'queued turn/queued turns')}"
        return f"Waiting for the batch: {mine}; a step takes {size}, from all users together."
    if judging:
        return f"The judge is reading {number(judging, 'turn/turns')}."
    return why_no_evidence(waiting, now["newest"])


def why_no_evidence(waiting: int, newest: list[dict[str, Any]]) -> str:
    """If nothing waits for the judge or the trainer. `newest`: turns with their state, reason and no_rl."""
    if not newest:
        return "Nothing has been asked yet."
    dropped = [turn for turn in newest if turn["state"] == "dropped"]
    open_ones = f"No next message yet: {number(waiting, 'answer waits/answers wait')} for what the person says next."
    if not dropped:
        return open_ones if waiting else "All turns are trained on: the next step waits for new ones."
    reason, count = Counter(cause(turn) for turn in dropped).most_common(1)[0]
    became = f"{len(dropped)} of the last {number(len(newest), 'answer/answers')} can't be trained on. "
    became += f"The most common reason ({count}): {reason}."
    return f"{open_ones} {became}" if waiting else became


def cause(turn: dict[str, Any]) -> str:
    said = next((said for begins, said in CAUSES if turn["reason"].startswith(begins)), turn["reason"])
    return f"{said} ({turn['no_rl']})" if turn["reason"] == journal.NO_HINT else said
