"""The results of evaluation/talk.py as a table and as a picture."""

import statistics
import textwrap
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

from evaluation.people import PEOPLE

STREAK = 3  # the paper's measure: sessions until the first answers of this many in a row are satisfactory


def sessions_to_effect(pleased: list[bool]) -> int | None:
    """Sessions until STREAK in a row had satisfactory first answers, including the streak; None: never."""
    for i in range(STREAK, len(pleased) + 1):
        if all(pleased[i - STREAK : i]):
            return i
    return None


def by_chance(p: float, sessions: int) -> str:
    """`sessions_to_effect` for a model that learns nothing and satisfies with probability p: how often it is reached in
    this many sessions, and its mean if it is."""
    streaks, reached = [1.0] + [0.0] * (STREAK - 1), []  # streaks[k]: probability of k satisfactory answers in a row
    for _ in range(sessions):
        reached.append(streaks[-1] * p)
        streaks = [sum(streaks) * (1 - p), *(q * p for q in streaks[:-1])]
    often = sum(reached)
    if often < 0.005:
        return "never"
    return f"{sum(n * q for n, q in enumerate(reached, 1)) / often:.0f}, in {100 * often:.0f} %"


def interval(values: list[float]) -> str:
    """Mean and half the 95 % confidence interval by Student's t."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 2.2)
    return f"{statistics.mean(values):.1f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method and person, over the seeds. All runs with the same people are cut to the sessions
    of the shortest."""
    lines = [
        "| method | person | seeds | sessions | sessions to effect | by chance | held-out before, % | after, % | "
        "log-lik. unrelated, change | KL to start, fixed text | words | cut off, % | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    key = itemgetter("person", "label")
    percent = lambda ms, what: interval([100 * m[what] for m in ms])  # noqa: E731
    words = lambda ms: f"{statistics.mean(m['words'] for m in ms):.0f}"  # noqa: E731
    for (people, label), group in groupby(sorted(results, key=key), key):
        runs = list(group)
        upto = min(r["measures"][-1]["talks"] for r in results if r["person"] == people)
        for name in people.split("+"):
            measured = [[m for m in r["measures"] if m["person"] == name and m["talks"] <= upto] for r in runs]
            first, last = [ms[0] for ms in measured], [ms[-1] for ms in measured]
            talked = [[f for f in r["firsts"][:upto] if f["person"] == name] for r in runs]
            effect = [sessions_to_effect([f["pleased"] for f in firsts]) for firsts in talked]
            never = f"not reached with {effect.count(None)} of {len(effect)}"
            reached = interval(effect) if all(effect) else never if any(effect) else "not reached"
            kl = [
                s["probe_kl"]
                for r, m in zip(runs, last, strict=True)
                for s in r["steps"]
                if s["step"] == m["step"] and s.get("owner", name) == name
            ]
            lost = [b["unrelated"] - a["unrelated"] for a, b in zip(first, last, strict=True)]
            lines.append(
                f"| {label} | {name}{' (jointly)' if '+' in people else ''} | {len(runs)} | {upto} | {reached} | "
                f"{by_chance(statistics.mean(m['satisfied'] for m in first), len(talked[0]))} | "
                f"{percent(first, 'satisfied')} | {percent(last, 'satisfied')} | "
                f"{statistics.mean(lost):+.3f} | {f'{statistics.mean(kl):.3f}' if kl else '-'} | "
                f"{words(first)} to {words(last)} | {percent(last, 'truncated')} | "
                f"{statistics.mean(m['minutes'] for m in last):.0f} |"
            )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw held-out satisfaction over sessions, a panel for each person: mean and range of each method's seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    people = sorted({m["person"] for r in results for m in r["measures"]})
    labels = sorted({r["label"] for r in results})
    figure, axes = plt.subplots(1, len(people), figsize=(max(5, 4 * len(people)), 3.6), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], people, strict=True):
        for label, jointly in product(labels, (False, True)):
            satisfied: dict[int, list[float]] = {}  # sessions -> % of each seed
            for r in results:
                for m in r["measures"]:
                    if (r["label"], "+" in r["person"], m["person"]) == (label, jointly, name):
                        satisfied.setdefault(m["talks"], []).append(100 * m["satisfied"])
            if satisfied:
                xs, ys = zip(*sorted(satisfied.items()), strict=True)
                color, seeds = f"C{labels.index(label)}", max(map(len, ys))
                text = f"{label}{', jointly with others' if jointly else ''} ({seeds} seed{'s' * (seeds > 1)})"
                axis.plot(xs, list(map(statistics.mean, ys)), "o:" if jointly else "o-", color=color, label=text)
                axis.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=color, alpha=0.2)
        axis.set(title=textwrap.fill(f"wants {PEOPLE[name].wants}", 32), ylim=(0, 103), xlabel="sessions talked")
        axis.legend(loc="lower right", fontsize=7)
    axes[0][0].set_ylabel("first answers that satisfy, %\n(held-out questions)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
