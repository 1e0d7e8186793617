"""OpenClaw-RL in one program: serve a model, judge what people say next, train on it, swap the weights, go on serving.

    python run.py                         serve and train until stopped
    python run.py --lr=2e-5 --out=mine    --key=value overrides config.py; a wrong key is an error

The loop is `train`, near the end. What it calls is one file away: journal, grpo, distill, policy, swap; server,
sessions and reward fill its queue.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from openai import APIError, AsyncOpenAI

import distill
import grpo
import journal
import policy
import reward
import server
import sessions
import swap
from config import Config, parse, plan
from journal import Turn, Verdict


async def judge_turns(
    waiting: "asyncio.Queue[str]",
    queued: "asyncio.Queue[str | None]",
    db: sqlite3.Connection,
    config: Config,
    client: AsyncOpenAI,
    state: policy.State,
) -> None:
    """One of several that judge side by side. A turn whose judge fails keeps waiting: never a score by accident."""
    while True:
        turn_id = await waiting.get()
        turn, following = journal.load_turn(db, turn_id)
        asked = sessions.last_request(turn.messages)
        request = "" if asked is None else sessions.text_of(turn.messages[asked].get("content"))
        model, hints, hinted_by = config.judge_model or config.name, [], ""
        small = state.judge_bias is not None
        options = {"votes": config.votes, "chars": reward.CHARS if small else 2000}
        try:
            score, votes = await reward.judge(
                client, model, request, turn.text, following, bias=state.judge_bias, **options
            )
            if config.w_opd and small and score < 0:
                hints, hinted_by = reward.own_words(request, following), "own words"
            elif config.w_opd and not small and score < 1:
                hints, hinted_by = await reward.hints(client, model, request, turn.text, following, **options), "judge"
        except reward.JudgeError as e:
            print(f"judge: {e}; {turn_id} is tried again in 30 s", file=sys.stderr)
            asyncio.get_running_loop().call_later(30, waiting.put_nowait, turn_id)
            continue
        verdict = Verdict(score, votes, hints, hinted_by if hints else "", model, "judge")
        if journal.record_verdict(db, turn_id, verdict):
            queued.put_nowait(turn_id)


async def main(config: Config) -> None:
    out = Path(config.out)
    start = policy.model_folder(config.model)
    folder = policy.latest_checkpoint(out, start) or start
    where = plan(config, folder)
    try:  # before the engine starts, which takes a while
        listener = socket.create_server((config.host, config.port))
    except OSError as e:
        sys.exit(f"--host={config.host} --port={config.port}: {e.strerror}")
    db = journal.open_journal(out / "journal.db")
    for s in (signal.SIGINT, signal.SIGTERM):  # the engine's start blocks the event loop
        signal.signal(s, lambda *_: sys.exit("stopped while starting"))
    address = f"http://{config.host}:{config.port}/v1"
    print(
        f"model     {folder}\n"
        f"device    {where.device}; training in {policy.compute_dtype(where.device)}\n"
        f"cores     {where.engine_cores} engine, {where.trainer_cores} trainer\n"
        f"memory    {where.needed:.1f} GiB needed, {where.free:.1f} free; engine {where.engine:.1f}\n"
        f"judge     {config.judge_url or 'the model itself'}, {where.judge_style} style, {config.votes} votes\n"
        f"address   {address}  model {config.name!r}  key {'needed' if config.key else 'any'}\n"
        f"out       {out.resolve()}",
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
        tool_parser=config.tool_parser,
        max_seqs=config.max_seqs,
    )
    engine = swap.start_engine(args)
    stop = asyncio.Event()
    for s in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(s, stop.set)
    trainer = ThreadPoolExecutor(1, "trainer", policy.settle_trainer_thread, (where.trainer_cores,))
    tasks: list[asyncio.Task] = []
    try:
        on_trainer = lambda f, *a: asyncio.get_running_loop().run_in_executor(trainer, f, *a)  # noqa: E731
        state = await on_trainer(
            policy.load_state,
            folder,
            start,
            where.device,
            config.lr,
            (config.beta1, config.beta2),
            config.kl,
        )
        await engine.update_weight_version(str(state.step))

        waiting: asyncio.Queue[str] = asyncio.Queue()
        queued: asyncio.Queue[str | None] = asyncio.Queue()  # judged turns, by id; None: stop
        journal.undo_step(db)
        for turn_id in journal.in_state(db, "judging"):
            waiting.put_nowait(turn_id)
        for turn_id in journal.in_state(db, "queued"):
            queued.put_nowait(turn_id)

        def on_feedback(turn_id: str, verdict: Verdict) -> None:
            if journal.record_verdict(db, turn_id, verdict):
                queued.put_nowait(turn_id)

        judge_key = secrets.token_urlsafe(24)
        keys = server.users_of(config.key)

        def status() -> dict:
            return {
                "step": state.step,
                "training": state.training,
                "batch_size": config.batch_size,
                "pause": state.pause,
                "turns": journal.counts(db),
                "dropped": journal.drop_reasons(db),
            }

        app = await server.build_app(engine, args, db, keys, judge_key, waiting.put_nowait, on_feedback, status)
        web = server.web_server(app)
        own = AsyncOpenAI(base_url=address, api_key=judge_key)
        judge_api_key = os.environ.get("JUDGE_API_KEY", "none")
        client = AsyncOpenAI(base_url=config.judge_url, api_key=judge_api_key) if config.judge_url else own
        tasks = [asyncio.create_task(web.serve(sockets=[listener]))]
        while not web.started and not tasks[0].done():
            await asyncio.sleep(0.05)
        if where.judge_style == "text":
            state.judge_bias = await reward.calibrate(client, config.judge_model or config.name)
        tasks += [
            asyncio.create_task(train(config, engine, state, queued, db, own, on_trainer)),
            *[asyncio.create_task(judge_turns(waiting, queued, db, config, client, state)) for _ in range(8)],
            asyncio.create_task(expire_turns(db, config.expire)),
            asyncio.create_task(stop.wait()),
        ]
        print(f"ready     after {time.monotonic() - STARTED:.0f} s", flush=True)
        pending = set(tasks)
        while not stop.is_set():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), swap.PushError):
                    state.training = f"stopped: {error}"
                    print(f"training stopped, serving goes on with step {state.step}: {error}", file=sys.stderr)
                elif error:
                    raise error
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
            if state.whole:
                ending.append(on_trainer(policy.save_checkpoint, state, out))
        await asyncio.gather(*ending)
        trainer.shutdown(wait=False, cancel_futures=True)
        db.close()


async def expire_turns(db: sqlite3.Connection, after_s: float) -> None:
    while True:
        journal.expire(db, after_s)
        await asyncio.sleep(min(60.0, after_s))


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
    state.training = "on"
    while not config.steps or state.step < config.steps:
        # 1. a batch of judged turns, fresh and short enough
        ids: list[str] = []
        while len(ids) < config.batch_size:
            if (turn_id := await queued.get()) is None:
                return
            sample = journal.load_sample(db, turn_id)
            turn = sample.turn
            if state.step - min(v for v, _, _ in turn.versions) > config.max_staleness:
                journal.drop(db, [turn_id], f"stale: more than {config.max_staleness} steps old")
            elif len(turn.prompt_ids) + len(turn.response_ids) > config.max_train_tokens:
                journal.drop(db, [turn_id], f"longer than {config.max_train_tokens} tokens")
            elif not config.w_rl and not sample.verdict.hints:
                journal.drop(db, [turn_id], "no hint, and the score is not trained on (w_rl is 0)")
            else:
                ids.append(turn_id)
        started, batch = time.monotonic(), journal.begin_step(db, ids)

        # 2. what there is to learn from: advantages for the scores, prompts with the hint in them for the corrections
        rewards, turns = [s.verdict.score for s in batch], [s.turn for s in batch]
        users, prompts = [t.user for t in turns], [tuple(t.prompt_ids) for t in turns]
        advs, baselines = grpo.advantages(rewards, users, prompts, state.baselines, config.baseline)
        hinted: list[list[list[int]]] = [[] for _ in batch]  # per turn, a prompt for each candidate hint
        for i, (turn, verdict) in enumerate((s.turn, s.verdict) for s in batch):
            if config.w_opd and verdict.hints:
                try:
                    prompts_of = distill.hinted_prompts(
                        client, turn.messages, turn.template, turn.prompt_ids, verdict.hints
                    )
                    room = config.max_train_tokens - len(turn.response_ids)
                    hinted[i] = [p for p in await prompts_of if len(p) <= room]
                    if not hinted[i]:
                        raise distill.NoHintedPrompt(f"longer than {config.max_train_tokens} tokens with it")
                except distill.NoHintedPrompt as e:
                    journal.note(db, turn.id, f"hint not used: {e}")

        # 3. gradient and Adam, off the event loop: serving and judging go on
        metrics = await on_trainer(update, config, state, turns, advs, hinted)
        if metrics is None:
            return
        trained = time.monotonic()

        # 4. swap: the engine gets the new weights while its answers go on
        weights = await on_trainer(policy.served_weights, state.policy)
        probe_logps = await on_trainer(policy.probe_logps, state.policy, state.probe_ids)
        gap, state.pause = await swap.push(
            engine, weights, state.step + 1, state.probe_ids, probe_logps, state.good, config.push_bound
        )
        state.good = await on_trainer(lambda: {name: w.cpu() for name, w in weights.items()})  # noqa: B023
        state.step, state.baselines, state.whole = state.step + 1, baselines, True
        journal.mark_trained(db, ids, state.step)

        # 5. one row, one line
        row = {
            "step": state.step,
            "reward": sum(rewards) / len(rewards),
            "length": metrics["tokens"] / len(turns),
            **metrics,
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
        if state.step % config.save_every == 0:
            await on_trainer(policy.save_checkpoint, state, Path(config.out))

        # 6. the judge is this model too, unless told otherwise, and has just changed
        if state.judge_bias and not config.judge_url and not state.stopping:
            try:
                state.judge_bias = await reward.calibrate(client, config.name)
            except (APIError, ValueError) as e:
                print(f"judge: its bias stays that of step {state.step - 1}: {e}", file=sys.stderr)
    state.training = "off"


def update(
    config: Config, state: policy.State, turns: list[Turn], advs: list[float], hinted: list[list[list[int]]]
) -> dict[str, float] | None:
    """One step of Adam on a batch, row by row; None, with nothing changed, when the program is to stop."""
    n = sum(len(t.response_ids) for t in turns)
    n_hinted = sum(len(t.response_ids) for t, prompts in zip(turns, hinted, strict=True) if prompts)
    sums: dict[str, float] = dict.fromkeys(("loss", "kl", "nll", "start_nll", "dlogp", "clipped"), 0.0)
    gap = dlogp_max = 0.0
    head = state.policy.get_output_embeddings().weight  # (V, D)
    for row in grpo.collate(
        [t.prompt_ids for t in turns],
        [t.response_ids for t in turns],
        [t.logprobs for t in turns],
        advs,
        [t.temperature for t in turns],
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
            top_ids, teacher, taught = distill.teach(state.policy, row, hidden.detach(), corrected, config.opd_k)
            ids = torch.cat([ids, top_ids], 1)  # (N, 1 + K): the sampled token's loss and the hint's, one pass
        logps = grpo.token_logps(hidden, head, ids, row["temperature"])  # (N, 1 or 1 + K)
        logp = logps[:, 0]
        loss = config.w_rl * grpo.ppo_clip_loss(
            logp, row["old_logp"], row["adv"], config.clip_low, config.clip_high, config.dual_clip
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
                    logp, row["old_logp"], adv, config.clip_low, config.clip_high, config.dual_clip
                )  # (N,)
            loss = loss + config.w_opd * taught * opd
            gap += (taught * (teacher - student).abs().mean(-1)).sum().item()
        if config.kl:
            start_logp = grpo.response_logps(state.start, row, grad=False)  # (N,)
            loss = loss + config.kl * grpo.kl_loss(logp, start_logp)
            sums["start_nll"] -= start_logp.sum().item()
            sums["kl"] += grpo.kl_value(logp.detach(), start_logp).sum().item()
        (loss.sum() / n).backward()
        for p, master in zip(state.policy.parameters(), state.masters, strict=True):
            if p.grad is not master.grad:  # bf16: sums over many rows need fp32
                master.grad.add_(p.grad)
                p.grad = None
        log_ratio = logp.detach() - row["old_logp"]
        outside = (log_ratio.exp() < 1 - config.clip_low) | (log_ratio.exp() > 1 + config.clip_high)
        sums["loss"] += loss.sum().item()
        sums["nll"] -= logp.sum().item()
        sums["dlogp"] += log_ratio.abs().sum().item()
        dlogp_max = max(dlogp_max, log_ratio.abs().max().item())
        sums["clipped"] += outside.sum().item()
    state.whole = False
    norm = torch.nn.utils.clip_grad_norm_(state.masters, config.grad_clip).item()
    state.adam.step()
    state.adam.zero_grad(set_to_none=False)
    policy.publish(state.masters, state.policy)
    return {
        "tokens": n,
        "grad_norm": norm,
        **{k: v / n for k, v in sums.items()},
        "dlogp_max": dlogp_max,
        "hinted": sum(map(bool, hinted)) / len(turns),
        "teacher_gap": gap / max(1, n_hinted),
        "repeated": sum(grpo.repetition(t.response_ids) for t in turns) / len(turns),
    }


STARTED = time.monotonic()

if __name__ == "__main__":
    asyncio.run(main(parse(sys.argv[1:])))
