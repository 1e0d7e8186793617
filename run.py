"""OpenClaw-RL in one program: serve a model, judge what people say next, train on it, swap the weights, go on serving.

    python run.py                         serve and train until stopped
    python run.py --lr=2e-5 --out=mine    --key=value overrides config.py; a wrong key is an error

    python run.py --print_client=openclaw       what to paste into a client, and end
    python run.py --out=mine --rollback=50      make the checkpoint of step 50 the current one, and end
    python run.py --out=mine --forget=SESSION   remove a conversation from the journal, and end

The loop is `train`, near the end. What it calls is one file away: journal, grpo, distill, guard, policy, swap; server,
sessions and reward fill its queue.
"""

import asyncio
import functools
import json
import math
import os
import secrets
import signal
import socket
import sqlite3
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from openai import AsyncOpenAI

import clients
import distill
import grpo
import guard
import journal
import policy
import reward
import server
import sessions
import swap
from config import Config, parse, plan
from journal import Sample, Turn, Verdict


async def judge_turns(
    waiting: "asyncio.Queue[str]",
    queued: "asyncio.Queue[str | None]",
    db: sqlite3.Connection,
    config: Config,
    judge: reward.ChatJudge | reward.HeadJudge,
    state: policy.State,
) -> None:
    """One of several that judge side by side. A turn whose judge fails keeps waiting: never a score by accident."""
    model = config.judge_model or config.name
    while True:
        turn_id = await waiting.get()
        turn, following = journal.load_turn(db, turn_id)
        request, answer = sessions.request_of(turn.messages), sessions.without_thinking(turn.text)
        try:
            score, votes, confidence = await judge.score(request, answer, following)
            hints = await judge.hints(request, answer, following) if config.w_opd and score < 0 else []
        except reward.JudgeError as e:
            print(f"judge: {e}; {turn_id} is tried again in 30 s", file=sys.stderr)
            asyncio.get_running_loop().call_later(30, waiting.put_nowait, turn_id)
            continue
        verdict = Verdict(score, votes, confidence, hints, judge.hinted_by if hints else "", model, "judge")
        while not journal.room(db):
            await asyncio.sleep(1)
        if journal.record_verdict(db, turn_id, verdict):
            queued.put_nowait(turn_id)
        elif not score:  # it doesn't reach the trainer, but silence counts: most people say nothing of a good answer
            from_tool = following[-1]["role"] == "tool"
            grpo.move_baseline(state.baselines, grpo.baseline_key(turn.user, from_tool), 0.0)


def fit_judge(loading: "Future[policy.State]", kept: Path) -> reward.Head:
    """On the judge's thread, while the engine starts: the trainer loads the model that the head reads."""
    state = loading.result()
    return reward.make_head(state.start, state.tokenizer, kept)


def maintain(config: Config, db: sqlite3.Connection, out: Path) -> None:
    """--rollback and --forget."""
    if config.rollback >= 0:
        undone = journal.rollback(db, config.rollback)
        policy.remove_other_checkpoints(out, journal.checkpoints(db))
        print(f"step {config.rollback} is the current one; {undone} turns that led on from there are dropped")
    if config.forget:
        removed, first = journal.forget(db, config.forget)
        if not removed:
            sys.exit(f"--forget={config.forget}: there is no such session in {out}/journal.db")
        trained = [step for step in journal.checkpoints(db) if first and step >= first]
        print(f"{removed} turns of {config.forget} are removed; checkpoints trained on one: {trained or 'none'}")


async def main(config: Config) -> bool:
    """True where the engine died, and a new start may help."""
    out, loopback = Path(config.out), config.host in server.LOOPBACK
    lock = journal.hold(out) if not config.print_client else None  # the server may run while its client is set up
    keys = server.users_of(config.key.split(",") if config.key else [] if loopback else server.own_keys(out / "keys"))
    if not keys and not loopback:
        sys.exit(f"--host={config.host} is not loopback, and there is no key in {out}/keys")
    anywhere = config.host in ("0.0.0.0", "::")
    address = f"http://{'127.0.0.1' if anywhere else config.host}:{config.port}/v1"  # for our own judge
    shown = f"http://{socket.getfqdn()}:{config.port}/v1" if anywhere else address
    paste = functools.partial(clients.paste, shown, config.name, next(iter(keys), "none"), config.max_model_len)
    if lock is None:
        print(paste(config.print_client))
        return False
    db = journal.open_journal(out / "journal.db")
    if not journal.room(db):
        sys.exit(f"--out={out}: the disk is full ({journal.RESERVE >> 20} MiB are needed for the journal)")
    if config.rollback >= 0 or config.forget:
        maintain(config, db, out)
        return False
    start = policy.model_folder(config.model)
    journal.claim(db, start, policy.fingerprint(start))
    step = journal.recover(db)
    policy.remove_other_checkpoints(out, journal.checkpoints(db))
    trim_metrics(out / "metrics.jsonl", step)
    folder = policy.checkpoint_folder(out, step) if step else start
    policy.check_folder(folder, policy.ROLL_BACK if step else "")
    tool_parser = swap.tool_parser_of(folder) if config.tool_parser == "auto" else config.tool_parser
    where = plan(config, folder)
    try:  # before the engine starts, which takes a while
        listener = socket.create_server((config.host, config.port))
    except OSError as e:
        sys.exit(f"--host={config.host} --port={config.port}: {e.strerror}")
    for s in (signal.SIGINT, signal.SIGTERM):  # the engine's start blocks the event loop
        signal.signal(s, lambda *_: sys.exit("stopped while starting"))
    print(
        f"model     {folder}\n"
        f"device    {where.device}; training in {where.dtype}"
        f"{', measured GFLOP/s: ' if where.gflops else ''}"
        f"{', '.join(f'{str(k)[6:]} {v:.0f}' for k, v in where.gflops.items())}\n"
        f"cores     {where.engine_cores} engine, {where.trainer_cores} trainer\n"
        f"memory    {where.needed:.1f} GiB needed, {where.free:.1f} free; engine {where.engine:.1f}\n"
        f"judge     {config.judge_url or 'the model itself'}, {where.judge_style} style\n"
        f"parsers   tool calls {tool_parser or 'none'}, thinking {config.reasoning_parser or 'none'}\n"
        f"address   {shown}  model {config.name!r}  key {'needed' if keys else 'any'}\n"
        f"out       {out.resolve()}\n"
        f"OpenClaw  in ~/.openclaw/openclaw.json (--print_client=openai, curl or open-webui for others):\n"
        f"{paste('openclaw')}",
        flush=True,
    )

    args = swap.engine_args(
        str(folder),
        name=config.name,
        max_model_len=config.max_model_len,
        device=where.device,
        memory_gib=where.engine,
        cores=where.engine_cores,
        seed=config.seed,
        tool_parser=tool_parser,
        reasoning_parser=config.reasoning_parser,
        max_seqs=config.max_seqs,
    )
    # The trainer loads, and a small model's judge is fitted, on their own cores while the engine starts.
    trainer = ThreadPoolExecutor(1, "trainer", policy.settle_trainer_thread, (where.trainer_cores,))
    judging = ThreadPoolExecutor(1, "judge", policy.settle_trainer_thread, (where.trainer_cores,))
    loading = trainer.submit(
        policy.load_state, folder, start, where.device, where.dtype, config.lr, (config.beta1, config.beta2)
    )
    if where.judge_style == "head":
        fitting = judging.submit(fit_judge, loading, policy.judge_cache(start))
    engine = swap.start_engine(args)
    stop, died = asyncio.Event(), asyncio.Event()
    for s in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(s, stop.set)
    tasks: list[asyncio.Task] = []
    try:
        on_trainer = lambda f, *a: asyncio.get_running_loop().run_in_executor(trainer, f, *a)  # noqa: E731
        state = await asyncio.wrap_future(loading)
        await engine.update_weight_version(str(state.step))

        waiting: asyncio.Queue[str] = asyncio.Queue()
        queued: asyncio.Queue[str | None] = asyncio.Queue()  # judged turns, by id; None: stop
        for turn_id in journal.in_state(db, "judging"):
            waiting.put_nowait(turn_id)
        for turn_id in journal.in_state(db, "queued"):
            queued.put_nowait(turn_id)

        def enqueue(queue: asyncio.Queue, turn_id: str) -> None:
            if journal.pending(db) > config.max_waiting:
                journal.drop(db, [turn_id], f"more than {config.max_waiting} turns wait for the judge or the trainer")
            else:
                queue.put_nowait(turn_id)

        def on_next(turn_id: str) -> None:
            enqueue(waiting, turn_id)

        def on_feedback(turn_id: str, verdict: Verdict) -> None:
            if journal.record_verdict(db, turn_id, verdict):
                enqueue(queued, turn_id)

        judge_key = secrets.token_urlsafe(24)

        def status() -> dict:
            return {
                "step": state.step,
                "training": state.training,
                "batch_size": config.batch_size,
                "pause": state.pause,
                "turns": journal.counts(db),
                "dropped": journal.drop_reasons(db),
            }

        app = await server.build_app(engine, args, db, keys, judge_key, on_next, on_feedback, status)
        web = server.web_server(app)
        own = AsyncOpenAI(base_url=address, api_key=judge_key)
        if where.judge_style == "head":
            judge = reward.HeadJudge(fitting, state.start, state.tokenizer, judging)
        else:
            client = reward.endpoint(config.judge_url) if config.judge_url else own
            longest = min(4096, config.max_model_len)  # vLLM refuses more
            judge = reward.ChatJudge(client, config.judge_model or config.name, config.votes, longest)
        watch = asyncio.create_task(
            swap.watch(engine, died)
        )  # to the very end, so that no call waits for a dead engine
        tasks = [asyncio.create_task(web.serve(sockets=[listener]))]
        while not web.started and not tasks[0].done():
            await asyncio.sleep(0.05)
        tasks += [
            asyncio.create_task(train(config, engine, state, queued, db, own, on_trainer)),
            *[asyncio.create_task(judge_turns(waiting, queued, db, config, judge, state)) for _ in range(8)],
            asyncio.create_task(expire_turns(db, config.expire)),
            asyncio.create_task(died.wait()),
            asyncio.create_task(stop.wait()),
        ]
        ready, pending = time.monotonic(), set(tasks)
        print(f"ready     after {ready - STARTED:.0f} s", flush=True)
        while not stop.is_set() and not died.is_set():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), swap.PushError | guard.Refused):
                    state.training = f"stopped: {error}"
                    print(f"training stopped, serving goes on with step {state.step}: {error}", file=sys.stderr)
                elif error and not engine.errored:
                    raise error
        if died.is_set() and time.monotonic() - ready < 60:
            sys.exit("the engine died soon after the start")
    finally:
        print("stopping", flush=True)
        ending = [asyncio.to_thread(engine.shutdown, 2)]
        if tasks:
            # The server and the trainer end by themselves: a step is left between two rows, a swap never half-way.
            web.should_exit = state.stopping = True
            queued.put_nowait(None)
            for task in tasks[2:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            watch.cancel()
            ending.append(save(config, state, db, on_trainer))
        await asyncio.gather(*ending)
        trainer.shutdown(wait=False, cancel_futures=True)
        judging.shutdown(wait=False, cancel_futures=True)
        db.close()
        lock.close()
    return died.is_set() and not stop.is_set()


def trim_metrics(metrics: Path, step: int) -> None:
    """Leave out what was measured in steps that are undone, and a line that was cut off."""
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]
        rows = [line for line in lines if json.loads(line)["step"] <= step]
        part = metrics.with_suffix(".part")
        part.write_text("".join(rows))
        part.replace(metrics)


async def save(config: Config, state: policy.State, db: sqlite3.Connection, on_trainer: Any) -> None:
    """A checkpoint, if there is something new. Where it can't be written, the next step tries again."""
    if state.step == max(journal.checkpoints(db), default=0):
        return
    try:
        await on_trainer(policy.save_checkpoint, state, Path(config.out), journal.RESERVE)
    except policy.CheckpointError as e:
        print(f"no checkpoint of step {state.step}: {e}", file=sys.stderr)
        return
    journal.add_checkpoint(db, state.step, config.keep)
    await on_trainer(policy.remove_other_checkpoints, Path(config.out), journal.checkpoints(db))


async def expire_turns(db: sqlite3.Connection, after_s: float) -> None:
    """The time in which the program did not run is not counted: it begins with a wait."""
    await asyncio.sleep(after_s)
    while True:
        if journal.room(db):
            journal.expire(db, after_s)
        await asyncio.sleep(min(60.0, after_s))


async def wait_for_room(db: sqlite3.Connection, state: policy.State) -> None:
    while not journal.room(db) and not state.stopping:
        state.training = "waits: the disk is full"
        await asyncio.sleep(1)
    state.training = "on"


async def train(
    config: Config,
    engine: Any,
    state: policy.State,
    queued: "asyncio.Queue[str | None]",
    db: sqlite3.Connection,
    client: AsyncOpenAI,
    on_trainer: Any,
) -> None:
    """The loop. `state` has the policy (the very weights that are served), its fp32 masters, Adam and the step."""
    refused, state.training = 0, "on"
    shares = {"user": config.user_share, "session": config.session_share, "truncated": config.truncated_share}
    while not config.steps or state.step < config.steps:
        # 1. a batch of judged turns that are fit for it, when there is room on the disk to say what became of them
        batch: list[Sample] = []
        while len(batch) < config.batch_size:
            if (turn_id := await queued.get()) is None or state.stopping:
                return
            await wait_for_room(db, state)
            sample = journal.load_sample(db, turn_id)
            why_not = guard.unfit(
                sample,
                batch,
                state.step,
                batch_size=config.batch_size,
                max_staleness=config.max_staleness,
                max_train_tokens=config.max_train_tokens,
                w_rl=config.w_rl,
                shares=shares,
            )
            if why_not:
                journal.drop(db, [turn_id], why_not)
            else:
                batch.append(sample)
        ids = [sample.turn.id for sample in batch]
        started, batch = time.monotonic(), journal.begin_step(db, ids)

        # 2. what there is to learn from: advantages for the scores, prompts with the hint in them for the corrections
        rewards, turns = [s.verdict.score for s in batch], [s.turn for s in batch]
        keys = [grpo.baseline_key(s.turn.user, s.from_tool) for s in batch]
        # What was sampled otherwise than by the plain policy has no advantage: it can only learn from its hint.
        scored = [0 if s.turn.no_rl or not config.w_rl else s.verdict.score for s in batch]
        advs = grpo.advantages(scored, keys, [tuple(t.prompt_ids) for t in turns], state.baselines, config.baseline)
        hinted: list[list[list[int]]] = [[] for _ in batch]  # per turn, a prompt for each candidate hint
        for i, (turn, verdict) in enumerate((s.turn, s.verdict) for s in batch):
            if state.stopping:
                return
            if config.w_opd and verdict.hints:
                try:
                    candidates = await distill.hinted_prompts(
                        client, turn.messages, turn.template, turn.prompt_ids, verdict.hints
                    )
                    room = config.max_train_tokens - len(turn.response_ids)
                    hinted[i] = [prompt for prompt in candidates if len(prompt) <= room]
                    if not hinted[i]:
                        raise distill.NoHintedPrompt(f"longer than {config.max_train_tokens} tokens with it")
                except distill.NoHintedPrompt as e:
                    if state.stopping:  # the server that renders it has gone
                        return
                    journal.note(db, turn.id, f"hint not used: {e}")
        useful = [i for i in range(len(batch)) if advs[i] or hinted[i]]
        for i in set(range(len(batch))) - set(useful):
            grpo.move_baseline(state.baselines, keys[i], rewards[i])
            journal.drop(db, [ids[i]], journal.NOTHING)
        if not useful:
            continue
        ids, rewards, keys, turns, advs, hinted = (
            [values[i] for i in useful] for values in (ids, rewards, keys, turns, advs, hinted)
        )

        # 3. gradient and Adam, off the event loop: serving and judging go on
        before = await on_trainer(policy.served_weights, state.policy)
        try:
            metrics = await on_trainer(update, config, state, turns, advs, hinted)
            if metrics is None:
                return
            probe = await on_trainer(guard.probe, state.policy, state.probe_ids, state.probe_prompts, state.first_logps)
            guard.check_weights(probe, state.first_probe, state.probe)
        except (guard.Refused, torch.OutOfMemoryError) as e:  # nobody has met these weights
            await on_trainer(policy.go_back, state)
            journal.drop(db, ids, f"step {state.step + 1} taken back: {e}")
            print(f"step {state.step + 1} taken back: {e}", file=sys.stderr)
            refused += 1
            if refused == guard.IN_A_ROW:
                raise guard.Refused(f"{refused} steps in a row taken back, the last one: {e}") from e
            continue
        trained, refused = time.monotonic(), 0

        # 4. swap: the engine gets the new weights while its answers go on
        weights = await on_trainer(policy.served_weights, state.policy)
        probe_logps = await on_trainer(policy.probe_logps, state.policy, state.probe_ids)
        gap, state.pause = await swap.push(
            engine, weights, state.step + 1, state.probe_ids, probe_logps, before, config.push_bound
        )
        await wait_for_room(db, state)
        journal.mark_trained(db, ids, state.step + 1)
        for key, r in zip(keys, rewards, strict=True):
            grpo.move_baseline(state.baselines, key, r)
        state.step, state.probe = state.step + 1, probe
        await on_trainer(policy.remember, state)

        # 5. one row, one line
        row = {
            "step": state.step,
            "reward": sum(rewards) / len(rewards),
            "length": metrics["tokens"] / len(turns),
            **metrics,
            **{f"probe_{k}": v for k, v in probe.items()},
            "push_gap": gap,
            "pause_s": state.pause[1] - state.pause[0],
            "train_s": trained - started,
            "push_s": time.monotonic() - trained,
            "stale": sum(state.step - 1 - max(v for v, _, _ in t.versions) for t in turns) / len(turns),
            "waiting": queued.qsize(),
            "time": time.time(),
        }
        with open(Path(config.out) / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "time"), flush=True)
        if state.step - max(journal.checkpoints(db), default=0) >= config.save_every:
            await save(config, state, db, on_trainer)
    state.training = "off"


def update(
    config: Config, state: policy.State, turns: list[Turn], advs: list[float], hinted: list[list[list[int]]]
) -> dict[str, Any] | None:
    """One step of Adam on a batch, row by row; None, with nothing changed, when the program is to stop.

    Returns what a step prints."""
    n = sum(len(t.response_ids) for t in turns)
    n_sampled = sum(len(t.response_ids) for t in turns if not t.no_rl)
    n_hinted = 0.0
    sums: dict[str, float] = dict.fromkeys(("loss", "kl", "nll", "start_nll", "dlogp", "clipped"), 0.0)
    gap = dlogp_max = 0.0
    head, start_head = (m.get_output_embeddings().weight for m in (state.policy, state.start))  # (V, D)
    for row in grpo.collate(
        [t.prompt_ids for t in turns],
        [t.response_ids for t in turns],
        [[math.nan] * len(t.logprobs) if t.no_rl else t.logprobs for t in turns],
        advs,
        [1.0 if t.no_rl else t.temperature for t in turns],
        config.row_tokens,
        state.policy.device,
    ):
        if state.stopping:
            return None
        # A long row doesn't keep its activations: they are made anew in the backward pass, at a third more time.
        if row["ids"].numel() > config.row_tokens:
            state.policy.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            state.policy.gradient_checkpointing_disable()
        hidden, ids = grpo.response_hidden(state.policy, row), row["target"][:, None]  # (N, D), (N, 1)
        corrected = {i: hinted[i] for i in row["sample"].unique().tolist() if hinted[i]}
        if corrected:
            # Behind the sampled token, for the score's loss, those for the hint's: of k = 0, the sampled one again.
            likely = distill.top_k(hidden.detach(), head, config.opd_k) if config.opd_k else ids  # (N, K)
            ids = torch.cat([ids, likely], 1)  # (N, 1 + K)
        logps = grpo.token_logps(hidden, head, ids, row["temperature"])  # (N, 1 or 1 + K)
        logp = logps[:, 0]
        if config.kl or corrected:
            with torch.no_grad():
                start_logps = grpo.token_logps(
                    grpo.response_hidden(state.start, row), start_head, ids, row["temperature"]
                )  # (N, 1 or 1 + K)
        if corrected:
            frozen = config.teacher == "start"
            model, plain = (state.start, start_logps) if frozen else (state.policy, logps.detach())
            teacher, taught = distill.teach(model, row, ids[:, 1:], corrected, plain[:, 1:])  # (N, K), (N,)
        sampled = ~row["old_logp"].isnan()  # (N,); not those of a turn that is here for its hint alone
        old_logp = torch.where(sampled, row["old_logp"], logp.detach())  # (N,)
        loss = config.w_rl * grpo.ppo_clip_loss(
            logp, old_logp, row["adv"], config.clip_low, config.clip_high, config.dual_clip
        )  # (N,)
        if corrected:
            student = logps[:, 1:].detach()  # (N, K)
            if config.opd_k:
                opd = distill.top_k_loss(
                    logps[:, 1:], student, teacher, config.opd_clip, config.clip_low, config.clip_high
                )  # (N,)
            else:  # the paper's first form: an advantage for the sampled token
                adv = distill.advantage(student, teacher, config.opd_clip).squeeze(-1)  # (N,)
                opd = grpo.ppo_clip_loss(
                    logp, old_logp, adv, config.clip_low, config.clip_high, config.dual_clip
                )  # (N,)
            loss = loss + config.w_opd * taught * opd
            gap += (taught * (teacher - student).abs().mean(-1)).sum().item()
            n_hinted += taught.sum().item()
        if config.kl:
            # Answers are a step or two old: tokens that the policy has left since then count for less.
            left = (logp.detach() - old_logp).exp().clamp(max=1.0)  # (N,)
            start_logp = start_logps[:, 0]
            loss = loss + config.kl * left * grpo.kl_loss(logp, start_logp)
            sums["start_nll"] -= start_logp.sum().item()
            sums["kl"] += (left * grpo.kl_value(logp.detach(), start_logp)).sum().item()
        # A gradient through logits / T is 1 / T as large: without the factor a cold turn would outweigh its batch.
        ((loss * row["temperature"]).sum() / n).backward()
        policy.add_up(state)
        log_ratio = logp.detach() - old_logp  # (N,)
        outside = (log_ratio.exp() < 1 - config.clip_low) | (log_ratio.exp() > 1 + config.clip_high)
        sums["loss"] += loss.sum().item()
        sums["nll"] -= logp.sum().item()
        sums["dlogp"] += log_ratio.abs().sum().item()
        dlogp_max = max(dlogp_max, log_ratio.abs().max().item())
        sums["clipped"] += outside.sum().item()
    norm = torch.nn.utils.clip_grad_norm_(state.masters, config.grad_clip).item()
    guard.check_batch(sums["loss"] / n, norm, sums["dlogp"] / max(1, n_sampled))
    state.adam.step()
    state.adam.zero_grad(set_to_none=False)
    policy.publish(state.masters, state.policy)
    return {
        "tokens": n,
        "grad_norm": norm,
        **{k: v / (max(1, n_sampled) if k == "dlogp" else n) for k, v in sums.items()},
        "dlogp_max": dlogp_max,
        "hinted": sum(map(bool, hinted)) / len(turns),
        "teacher_gap": gap / max(1, n_hinted),
        "repeated": sum(grpo.repetition(t.response_ids) for t in turns) / len(turns),
    }


STARTED = time.monotonic()

if __name__ == "__main__":
    if asyncio.run(main(parse(sys.argv[1:]))):
        print("the engine died; starting again from the last checkpoint", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv])
