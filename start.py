"""Startup: check the options, plan the machine, start the engine, load the trainer, prepare the judge."""

import asyncio
import json
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import chat_judge
import probe
import reward
import swap
import trainer
from clients import connections, endpoint
from clients.keys import LOOPBACK, Keys
from config import Config
from durable import checkpoint, journal, upkeep
from durable.atomic import replacing
from durable.errors import UsageError
from durable.model import CACHE, check_folder, check_rank, fingerprint, model_folder
from machine.plan import LAST_DTYPE, bind_thread, make_plan
from program import BY_ADMIN, PAUSED, Program
from web import terminal


async def setup(config: Config) -> Program:
    """Check the options and the folder, start the engine, load the weights. UsageError if something is wrong."""
    out = Path(config.out)
    lock = upkeep.lock_out_dir(out)
    keys = Keys(out, needed=config.host not in LOOPBACK)
    connections.check_tls(config.ssl_certfile, config.ssl_keyfile)
    db = journal.open_journal(out / "journal.db")
    if not journal.has_disk_space(db):
        raise UsageError(f"--out={out}: the disk is full ({journal.RESERVE >> 20} MiB are needed for the journal)")
    start = model_folder(config.model)
    await journal.patiently(upkeep.bind_model, db, start, fingerprint(start), config.adapters)
    await journal.patiently(journal.recover, db)
    checkpoint.remove_others(out, journal.listed(db))
    paused = dict.fromkeys(json.loads(os.environ.pop(PAUSED, "[]")), BY_ADMIN)
    for owner, step in (steps := journal.owners(db)).items():
        if why_not := check_rank(checkpoint.folder_of(out, owner, step), config.lora_rank):
            if not owner:
                raise UsageError(why_not)
            paused[owner] = f"stopped: {why_not}"  # other users can still be trained and served
    checkpoint.trim_metrics(out / "metrics.jsonl", steps)
    saved = checkpoint.folder_of(out, "", steps.get("", 0))
    folder = start if config.lora_rank or not saved else saved  # what the engine starts with
    check_folder(folder, trainer.ROLL_BACK if saved else "")
    plan = make_plan(config, start)
    with replacing(out / LAST_DTYPE) as part:
        part.write_text(str(plan.dtype))
    config = replace(config, row_tokens=plan.row_tokens)
    listener = connections.listen(config.host, config.port)  # before the engine starts, which takes a while
    print(config.url, file=lock, flush=True)  # for the commands of durable/admin.py
    engine_args = swap.engine_args(config, folder, plan)
    print(f"model     {folder}\n{plan.report}\n{terminal.summary(config, plan, engine_args, keys)}", flush=True)
    # Two threads load the trainer and fit a small model's judge. On a CPU they do so while the engine starts, on other
    # cores, but not until its core process is forked: a lock that a thread holds at a fork would stay locked in the
    # child. On a GPU nothing is forked, and they begin after the engine's start: vLLM would subtract the memory that
    # they take from its KV cache. `stopping` ends the fitting early: a process can't exit while its threads run.
    stopping, may_load = threading.Event(), threading.Event()
    os.register_at_fork(after_in_parent=may_load.set)
    threads = [ThreadPoolExecutor(1, name, bind_thread, (plan.trainer_cores,)) for name in ("train", "judge")]
    threads[0].submit(may_load.wait)
    loading = threads[0].submit(trainer.load_state, config, saved, start, plan.device, plan.dtype)
    fitting = threads[1].submit(fit_judge, loading, start, stopping) if plan.judge_style == "head" else None
    engine = None
    try:
        engine = swap.start_engine(engine_args, [lock.fileno(), listener.fileno()])
        may_load.set()
        state = await asyncio.wrap_future(loading)
        state.stopping = stopping
        await swap.begin_with(engine, 0 if config.lora_rank else state.step)
        model = state.start if config.lora_rank else state.policy  # what the engine has now
        logps = threads[0].submit(probe.token_logps, model, state.probe.ids)
        try:
            await swap.verify(engine, (state.probe.ids, await asyncio.wrap_future(logps)))
        except swap.PushError as e:
            raise UsageError(f"{folder}: {e}") from e
        if config.lora_rank and saved:
            await swap.load(engine, trainer.served_weights(state.policy), state.step)
    except BaseException:
        stopping.set()
        loading.cancel()  # if it has not begun: the program could not exit before it is done
        may_load.set()
        if engine:
            swap.stop_engine(engine)
        raise
    return Program(
        config, lock, db, listener, keys, engine_args, engine, {"": state}, plan, *threads, fitting, paused=paused
    )


def fit_judge(loading: "Future[trainer.State]", start: Path, stopping: threading.Event) -> reward.Head:
    state = loading.result()
    return reward.make_head(state.start, state.tokenizer, CACHE / "judge" / fingerprint(start)[:16], stopping)


Judge = chat_judge.ChatJudge | reward.HeadJudge


def make_judge(p: Program) -> Judge:
    own_client = p.own_client  # made now, while it trusts the certificate that the server has
    if p.fitting:
        return reward.HeadJudge(p.fitting, p.state.start, p.state.tokenizer, p.judging)
    # With LoRA the engine still has the starting weights: a judge that doesn't change with training.
    client, model = own_client, p.config.name + (swap.FIRST_WEIGHTS if p.config.lora_rank else "")
    if p.config.judge_url:
        client, model = endpoint.connect(p.config.judge_url), p.config.judge_model
    longest = min(4096, p.config.max_model_len)  # vLLM refuses a max_tokens over the context
    return chat_judge.ChatJudge(client, model, votes=p.config.votes, max_tokens=longest)
