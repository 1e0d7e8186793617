"""From judged turns to a batch: which turns are trained on together, and what each one teaches."""

import asyncio
import math
import sqlite3
from collections import defaultdict

import distill
import grpo
import trainer
from durable import guard, journal
from durable.journal import Sample
from program import Program

SETTLE_S = 2.0  # from verdict to training: the judged message may be the client's own, and the user's replaces it soon
DROPS_AT_ONCE = 100  # most turns to drop before other tasks run


async def next_batch(p: Program) -> list[sqlite3.Row]:
    """The turns for the next step (rows of `journal.queued`, all for the same owner's weights); [] if there is no batch
    yet. Newest first, so that under overload only the oldest become stale. Turns that can't be trained on are dropped.
    The caller must hold `p.stepping`."""
    if "" in p.paused:
        return []
    now, size, steps = asyncio.get_running_loop().time(), p.config.batch_size, p.steps()
    queued, batches, unfit, failed = journal.queued(p.db), defaultdict[str, list](list), [], []
    settling = False  # will a turn settle soon?
    # Turns judged before a restart, or rated by a person, are not in it yet: they count as judged now.
    p.judged_at = {turn["id"]: p.judged_at.get(turn["id"], now) for turn in queued}
    # Turns over their user's share come last: they fill a batch only if no other user's turns are waiting.
    for turn in sorted(queued, key=lambda turn: turn["newer"] >= max(1.0, p.config.user_share * size)):
        owner = p.owner_of(turn["user"])
        judged_at = p.judged_at[turn["id"]]
        settled = judged_at <= now and (turn["final"] or judged_at + SETTLE_S <= now)
        settling |= not settled
        if owner in p.paused or not settled or len(batches[owner]) == size or len(unfit) == DROPS_AT_ONCE:
            continue
        if why_not := guard.reject_reason(turn, batches[owner], steps.get(owner, 0), p.config):
            unfit.append((turn["id"], why_not))
        elif turn["attempts"] >= journal.ALONE_AFTER:
            failed.append(turn)
        else:
            batches[owner].append(turn)
    for turn_id, why_not in unfit:
        await p.write(journal.drop, [turn_id], why_not)
    if unfit:
        p.wake.set()
        await asyncio.sleep(0)
        return []
    wait = 0 if p.train_now else p.config.batch_wait or math.inf
    p.train_now &= settling and not any(batches.values())
    newest = {owner: max(p.judged_at[turn["id"]] for turn in batch) for owner, batch in batches.items() if batch}
    for owner in sorted(newest.keys() - p.states, key=newest.get) + list(p.states):  # least recently trained first
        if owner in newest and (len(batches[owner]) == size or newest[owner] + wait <= now):
            return batches[owner]
    return failed[:1]  # alone, and after all others: it may fail again


async def prepare_lessons(
    p: Program, state: trainer.State, batch: list[Sample]
) -> tuple[list[Sample], list[trainer.Lesson]]:
    """The samples of a batch that teach something, each with its lesson. The others are dropped."""
    keys = [grpo.baseline_key(s.turn.user, s.from_tool) for s in batch]
    prompts = [tuple(s.turn.prompt_ids) for s in batch]
    # An answer that was not sampled from the plain policy gets no advantage: only its hint can be trained on.
    scores = [0 if s.turn.no_rl or not p.config.w_rl else s.verdict.score for s in batch]
    advs = grpo.advantages(scores, keys, prompts, state.baselines, p.config.baseline)
    kept, lessons = [], []
    for sample, key, adv in zip(batch, keys, advs, strict=True):
        hinted = await hinted_prompts(p, sample) if p.config.w_opd and sample.verdict.hints else {}
        if adv or hinted:
            kept.append(sample)
            lessons.append(trainer.Lesson(sample.turn, adv, list(hinted.values()), list(hinted)))
        else:
            grpo.move_baseline(state.baselines, key, sample.verdict.score)
            await p.write(journal.drop, [sample.turn.id], journal.NOTHING_TO_LEARN)
    return kept, lessons


async def hinted_prompts(p: Program, sample: Sample) -> dict[str, list[int]]:
    """The prompt with each candidate hint that fits. {} if none can be used; the reason goes into the turn's row."""
    longest = p.config.max_train_tokens - len(sample.turn.response_ids)
    try:
        prompts = await distill.hinted_prompts(p.own_client, sample.turn, sample.verdict.hints)
        by_hint = zip(sample.verdict.hints, prompts, strict=True)
        if not (fitting := {hint: prompt for hint, prompt in by_hint if len(prompt) <= longest}):
            raise distill.NoHintedPrompt(f"longer than {p.config.max_train_tokens} tokens with it")
    except distill.NoHintedPrompt as e:
        await p.write(journal.note, sample.turn.id, f"hint not used: {e}")
        return {}
    return fitting
