"""From judged turns to a batch: which of them are trained on, and what each of them teaches."""

import distill
import grpo
import trainer
from durable import guard, journal
from durable.journal import Sample
from program import Program


async def next_batch(p: Program) -> list[Sample]:
    """Wait for a full batch. Turns that are unfit for it are dropped with their reason, once there is disk space to
    write that down."""
    batch: list[Sample] = []
    while len(batch) < p.config.batch_size:
        turn_id = await p.to_train.get()
        await p.wait_for_disk_space()
        batch = [sample for sample in batch if journal.is_queued(p.db, sample.turn.id)]
        if not journal.is_queued(p.db, turn_id) or turn_id in [sample.turn.id for sample in batch]:
            continue  # trained on already, or judged again
        sample = journal.load_sample(p.db, turn_id)
        if why_not := guard.reject_reason(sample, batch, p.state.step, p.config):
            journal.drop(p.db, [turn_id], why_not)
        else:
            batch.append(sample)
    return journal.begin_step(p.db, [sample.turn.id for sample in batch])


async def prepare_lessons(p: Program, batch: list[Sample]) -> tuple[list[Sample], list[trainer.Lesson]]:
    """The samples of a batch that teach something, and what; the others are dropped."""
    keys = [grpo.baseline_key(s.turn.user, s.from_tool) for s in batch]
    prompts = [tuple(s.turn.prompt_ids) for s in batch]
    # What was not sampled from the plain policy has no advantage: it can only learn from its hint.
    scores = [0 if s.turn.no_rl or not p.config.w_rl else s.verdict.score for s in batch]
    advs = grpo.advantages(scores, keys, prompts, p.state.baselines, p.config.baseline)
    kept, lessons = [], []
    for sample, key, adv in zip(batch, keys, advs, strict=True):
        hinted = await hinted_prompts(p, sample) if p.config.w_opd and sample.verdict.hints else []
        if adv or hinted:
            kept.append(sample)
            lessons.append(trainer.Lesson(sample.turn, adv, hinted))
        else:
            grpo.move_baseline(p.state.baselines, key, sample.verdict.score)
            journal.drop(p.db, [sample.turn.id], journal.NOTHING)
    return kept, lessons


async def hinted_prompts(p: Program, sample: Sample) -> list[list[int]]:
    """A prompt for each candidate hint that fits; [] where none can be used, with the reason in the turn's row."""
    turn, longest = sample.turn, p.config.max_train_tokens - len(sample.turn.response_ids)
    try:
        prompts = await distill.hinted_prompts(
            p.own_client, turn.messages, turn.template, turn.prompt_ids, sample.verdict.hints
        )
        if not (fitting := [prompt for prompt in prompts if len(prompt) <= longest]):
            raise distill.NoHintedPrompt(f"longer than {p.config.max_train_tokens} tokens with it")
    except distill.NoHintedPrompt as e:
        journal.note(p.db, turn.id, f"hint not used: {e}")
        return []
    return fitting
