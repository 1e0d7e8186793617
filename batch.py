"""From judged turns to a batch: which turns are trained on together, and what each one teaches."""

import asyncio

import distill
import grpo
import trainer
from durable import guard, journal
from durable.journal import Sample
from program import Program

TRAIN_NOW = ""  # in the queue: don't wait for a full batch


async def next_batch(p: Program) -> list[Sample]:
    """Wait for a full batch, newest turns first: under overload the oldest get stale. A batch that got no further turn
    for --batch_wait seconds is not waited for. Turns that can't be trained on are dropped with the reason, when there
    is disk space to record it."""
    batches: dict[str, list[Sample]] = {}  # by owner of the weights: a step trains one owner's
    grown: dict[str, float] = {}  # when each batch got its last turn, by the event loop's clock
    later: list[str] = []  # turns of users who already have their share of the batch, while others wait

    def unchanged(owner: str) -> list[Sample]:
        """The owner's batch without turns that were rated, left out or forgotten while they waited in it."""
        return [s for s in batches.get(owner, []) if owner not in p.paused and journal.is_queued(p.db, s.turn.id)]

    train_now = False
    while True:
        await asyncio.sleep(0)  # a long queue of turns to drop must not block serving
        if train_now and p.to_train.empty():
            train_now = False
            if batch := max(map(unchanged, batches), key=len, default=[]):
                break
        nobody_else = bool(later) and p.to_train.empty()
        oldest = min(grown, key=grown.get, default="")
        ends = grown[oldest] + p.config.batch_wait if grown and p.config.batch_wait else None
        try:
            async with asyncio.timeout_at(ends):
                turn_id = later.pop(0) if nobody_else else await p.to_train.get()
        except TimeoutError:
            del grown[oldest]
            if batch := unchanged(oldest):
                break
            continue
        await p.wait_for_disk_space()
        if turn_id == TRAIN_NOW:
            train_now = True  # with all turns that are judged by now: the queue gives its newest entry first
            continue
        if not journal.is_queued(p.db, turn_id):
            continue
        try:
            sample = journal.load_sample(p.db, turn_id)
        except KeyError:  # its row is damaged, or was deleted by `forget` just now
            await journal.patiently(journal.drop, p.db, [turn_id], journal.UNREADABLE)
            continue
        owner = p.owner_of(sample.turn.user)
        batch = batches[owner] = unchanged(owner)
        if owner in p.paused or turn_id in [s.turn.id for s in batch]:
            continue
        if why_not := guard.reject_reason(sample, batch, p.step_of(owner), p.config):
            await journal.patiently(journal.drop, p.db, [turn_id], why_not)
        elif not owner and not nobody_else and guard.has_user_share(sample, batch, p.config):
            later.append(turn_id)
        elif sample.attempts >= journal.ALONE_AFTER:
            batch = [sample]
            break
        else:
            batch.append(sample)
            grown[owner] = asyncio.get_running_loop().time()
            if len(batch) == p.config.batch_size:
                break
    taken = {s.turn.id for s in batch}
    later += [s.turn.id for waiting in batches.values() for s in waiting if s.turn.id not in taken]
    for turn_id in dict.fromkeys(later):
        p.to_train.put_nowait(turn_id)
    return batch


async def prepare_lessons(
    p: Program, state: trainer.State, batch: list[Sample]
) -> tuple[list[Sample], list[trainer.Lesson]]:
    """The samples of a batch that teach something, each with its lesson. The others are dropped."""
    keys = [grpo.baseline_key(s.turn.user, s.from_tool) for s in batch]
    prompts = [tuple(s.turn.prompt_ids) for s in batch]
    # An answer that was not sampled from the plain policy gets no advantage: it can only learn from its hint.
    scores = [0 if s.turn.no_rl or not p.config.w_rl else s.verdict.score for s in batch]
    advs = grpo.advantages(scores, keys, prompts, state.baselines, p.config.baseline)
    kept, lessons = [], []
    for sample, key, adv in zip(batch, keys, advs, strict=True):
        hinted = await hinted_prompts(p, sample) if p.config.w_opd and sample.verdict.hints else []
        if adv or hinted:
            kept.append(sample)
            lessons.append(trainer.Lesson(sample.turn, adv, hinted))
        else:
            grpo.move_baseline(state.baselines, key, sample.verdict.score)
            await journal.patiently(journal.drop, p.db, [sample.turn.id], journal.NOTHING)
    return kept, lessons


async def hinted_prompts(p: Program, sample: Sample) -> list[list[int]]:
    """A prompt for each candidate hint that fits. [] if none can be used; the reason goes into the turn's row."""
    turn, longest = sample.turn, p.config.max_train_tokens - len(sample.turn.response_ids)
    try:
        prompts = await distill.hinted_prompts(
            p.own_client, turn.messages, turn.template, turn.prompt_ids, sample.verdict.hints
        )
        if not (fitting := [prompt for prompt in prompts if len(prompt) <= longest]):
            raise distill.NoHintedPrompt(f"longer than {p.config.max_train_tokens} tokens with it")
    except distill.NoHintedPrompt as e:
        await journal.patiently(journal.note, p.db, turn.id, f"hint not used: {e}")
        return []
    return fitting
