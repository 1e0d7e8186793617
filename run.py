"""OpenClaw-RL in one program: serve a model, score its answers from the next message, train, swap the weights.

    python run.py --out=mine        every option: python run.py --help

Read `train` and `step` first: they are the training loop. `judge_turns` feeds it, and server.py records the turns.
start.py sets everything up, `serve` runs it, `stop` ends it.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import grpo
import server
import swap
import trainer
from batch import next_batch, prepare_lessons
from clients import sessions
from clients.connections import WebServer, web_server
from clients.endpoint import JudgeError
from config import Config, parse
from durable import atomic, guard, journal, upkeep
from durable.errors import UsageError
from durable.journal import Sample, Verdict
from program import BY_ADMIN, OFF, PAUSED, Program
from start import Judge, make_judge, setup
from web import control, feedback, page, terminal

STARTED = time.monotonic()
STOPPING = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is ignored under nohup
    STOPPING.append(signal.SIGHUP)
RETRY_S = 1.0  # until a turn is tried again after its judge failed
LATER_S = 60.0  # the same after any other error
LOCK_WAIT_S = 5.0  # how long a clean stop waits for another program's write lock on the journal


# ---- the judge's loop ----


async def judge_turns(p: Program, judge: Judge) -> None:
    """One of eight judging loops."""
    while True:
        turn_id = await p.to_judge.get()
        await p.judge_health.wait()
        try:
            await judge_turn(p, judge, turn_id)
        except Exception:  # the journal can't be written, for example; `keep_running` starts this loop again
            asyncio.get_running_loop().call_later(LATER_S, p.to_judge.put_nowait, turn_id)
            raise


async def judge_turn(p: Program, judge: Judge, turn_id: str) -> None:
    """Judge a turn and record the verdict. If the judge fails, the turn keeps its state "judging" and is retried: an
    error is never a score. It is dropped only if it fails several times while other turns get verdicts."""
    try:
        turn, following = journal.load_turn(p.db, turn_id)
    except KeyError:  # its row is damaged, or was deleted by `forget`
        await p.write(journal.drop, [turn_id], journal.UNREADABLE)
        return
    request, answer = sessions.request_of(turn.messages), sessions.without_thinking(turn.text)
    try:
        score, votes, confidence = await judge.score(request, answer, following)
        hints = await judge.hints(request, answer, following) if p.config.w_opd and score < 0 else []
    except Exception as error:
        if not isinstance(error, JudgeError):  # a bug in a judge, or no memory
            traceback.print_exception(error)
            error = JudgeError(f"{type(error).__name__}: {error}", of_turn=True)
        if p.judge_health.failed(turn_id, error):
            # Unless a person has rated it meanwhile.
            why_not = f"the judge failed: {error}"
            await p.write(journal.drop_where, why_not, "id = ? AND state = 'judging'", turn_id)
        else:
            asyncio.get_running_loop().call_later(RETRY_S, p.to_judge.put_nowait, turn_id)
        return
    p.judge_health.worked(turn_id)
    model = p.config.judge_model or p.config.name
    verdict = Verdict(score, votes, confidence, hints, judge.hinted_by if hints else "", model, "judge")
    await p.wait_for_disk_space()
    state = await p.write(journal.record_verdict, turn_id, verdict, following)
    if state == "queued":
        p.judged_at[turn_id] = asyncio.get_running_loop().time()
        p.wake.set()
    elif state and not score:
        # A neutral turn is not trained on, but it moves the baseline towards 0: most people say nothing about a good
        # answer. (With --adapters=user, this is skipped while the user's training state is not in memory.)
        if trained := p.states.get(p.owner_of(turn.user)):
            key = grpo.baseline_key(turn.user, following[-1]["role"] == "tool")
            grpo.move_baseline(trained.baselines, key, 0.0)


# ---- the training loop ----


async def train(p: Program) -> None:
    """The training loop. A step that fails is undone, and the loop continues. The turns of a step that the guard
    refuses are dropped. After any other error they are queued again and training stops: after a failed push until the
    admin resumes it, otherwise for a time that doubles with each failure.

    EngineDied if the engine must be started again, Stopped if the program is stopping."""
    refused, failed = Counter[str](), Counter[str]()  # owner -> steps in a row that the guard refused, or that failed
    new_thread = False  # does the next step need a new trainer thread?
    while True:
        if p.config.steps and sum(p.steps().values()) >= p.config.steps:
            p.paused.setdefault("", OFF)
        else:
            p.end_pause(OFF)  # after a rollback
        with suppress(TimeoutError):
            async with asyncio.timeout(1):  # nothing sets `wake` when a verdict settles or --batch_wait is over
                await p.wake.wait()
        p.wake.clear()
        await p.wait_for_disk_space()
        async with p.stepping:  # no rollback or forget between the choice of a batch and its step
            turns = await next_batch(p)
            if not turns:
                continue
            p.wake.set()  # to look for another batch after this step
            owner = p.owner_of(turns[0]["user"])
            try:
                state = await p.state_of(owner)
            except UsageError as e:  # their checkpoint is damaged
                p.stop_training(str(e), owner=owner)
                continue
            try:
                if new_thread:
                    p.new_trainer_thread()
                batch = await p.write(journal.begin_step, [turn["id"] for turn in turns])
                await step(p, state, batch)
                refused[owner], failed[owner], new_thread = 0, 0, False
            except (trainer.Stopped, swap.EngineDied):
                raise
            except guard.Refused as e:
                refused[owner] += 1
                await p.undo(state)
                why_not = f"step {state.step + 1} reverted: {e}"
                await p.write(journal.drop, journal.in_state(p.db, "training"), why_not)
                print(why_not, file=sys.stderr)
                if refused[owner] >= guard.IN_A_ROW:
                    p.stop_training(f"{refused[owner]} steps in a row reverted, the last one: {e}", owner=owner)
            except Exception as e:
                failed[owner] += 1
                new_thread, error = True, f"{type(e).__name__}: {e}"
                traceback.print_exception(e)
                traceback.clear_frames(e.__traceback__)  # they hold the step's tensors; the undo needs memory
                await p.undo(state)
                await p.write(journal.requeue, error)
                p.stop_training(error, None if isinstance(e, swap.PushError) else min(3600, 5 * 2 ** failed[owner]))
            await p.unload_states()


async def step(p: Program, state: trainer.State, batch: list[Sample]) -> None:
    """One training step: lessons, update, swap, commit, report."""
    config, started = p.config, time.monotonic()

    # 1. lessons: the score becomes an advantage, the correction becomes hinted prompts
    batch, lessons = await prepare_lessons(p, state, batch)
    if not lessons:
        return

    # 2. gradient and Adam
    metrics = await p.on_trainer(trainer.update, config, state, lessons)
    weights = await p.on_trainer(trainer.served_weights, state.policy)
    trained = time.monotonic()

    # 3. swap: check the new weights, then the engine serves them; running answers continue
    await swap.begin_load(p.engine, weights)
    probed, probe_logps = await p.on_trainer(state.probe.measure, state.policy)
    guard.check_weights(probed, state.probe.first, state.probed)
    gap, p.pause = await swap.push(p.engine, weights, state.step + 1, (state.probe.ids, probe_logps), state.owner)

    # 4. commit: an undo now returns to this step; a restart does so only once a checkpoint has it
    await p.wait_for_disk_space()
    for lesson in lessons:
        if lesson.hinted:
            await p.write(journal.put_first, lesson.turn.id, lesson.hints[lesson.used])
    await p.write(journal.mark_trained, [sample.turn.id for sample in batch], state.step + 1)
    await p.on_trainer(trainer.commit, state, state.step + 1, state.baselines, probed)
    for s in batch:
        grpo.move_baseline(state.baselines, grpo.baseline_key(s.turn.user, s.from_tool), s.verdict.score)

    # 5. report, and a checkpoint every `save_every` steps
    seconds = {"train_s": trained - started, "push_s": time.monotonic() - trained}
    report(p, state, batch, metrics | {f"probe_{k}": v for k, v in probed.items()} | {"push_gap": gap} | seconds)
    if state.step - journal.saved_step(p.db, state.owner) >= config.save_every:
        await p.save(state)


def report(p: Program, state: trainer.State, batch: list[Sample], metrics: dict[str, float]) -> None:
    """One line on the screen and one row in metrics.jsonl for a step."""
    row = {
        "step": state.step,
        "reward": sum(s.verdict.score for s in batch) / len(batch),
        "length": metrics["tokens"] / len(batch),
        **metrics,
        "pause_s": p.pause[1] - p.pause[0],
        "stale": sum(state.step - 1 - max(v for v, _, _ in s.turn.versions) for s in batch) / len(batch),
        "waiting": journal.counts(p.db).get("queued", 0),
        "time": time.time(),
    }
    p.last_step = row
    row = {"owner": state.owner} | row if state.owner else row
    atomic.append(Path(p.config.out) / "metrics.jsonl", json.dumps(row).encode() + b"\n")
    terminal.print_step(row)


# ---- the program ----


async def serve(p: Program) -> bool:
    """Serve, judge and train until a signal, or until the engine dies; True if a restart may help."""
    stopped, died = asyncio.Event(), p.died
    for s in STOPPING:
        asyncio.get_running_loop().add_signal_handler(s, on_signal, s, stopped)
    for turn_id in journal.in_state(p.db, "judging"):
        p.to_judge.put_nowait(turn_id)
    judge = make_judge(p)
    app = await server.build_app(p, [*control.routes(p), *feedback.routes(p), *page.routes(p)])
    gc.collect()
    gc.freeze()  # otherwise each full collection goes through all imported modules, and stops the event loop for 0.3 s
    web = web_server(app, p.config.ssl_certfile, p.config.ssl_keyfile)
    # `watch` runs until the end: without it, a call to a dead engine would hang.
    watch = asyncio.create_task(swap.watch(p.engine, died), name="watch")
    tasks = [asyncio.create_task(web.serve(sockets=[p.listener]), name="server")]
    while not web.started and not tasks[0].done():
        await asyncio.sleep(0.05)
    background = {
        "train": train,
        "expire": lambda p: upkeep.expire_turns(p.db, p.config.expire),
        "prune": lambda p: upkeep.prune_turns(p.db, Path(p.config.out) / "journal.db", p.config.keep_days),
        "progress": terminal.show_progress,
        **{f"judge {i}": lambda p: judge_turns(p, judge) for i in range(8)},
    }
    tasks += [asyncio.create_task(keep_running(p, name, work), name=name) for name, work in background.items()]
    tasks += [asyncio.create_task(event.wait(), name="end") for event in (died, stopped)]
    ready, pending = time.monotonic(), set(tasks)
    if web.started:
        print(f"ready     after {ready - STARTED:.0f} s", flush=True)
    try:
        while not stopped.is_set() and not died.is_set():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for error in (task.exception() for task in done):
                if error and not p.engine.errored:
                    raise error
        if died.is_set() and time.monotonic() - ready < 60:
            raise UsageError("the engine died soon after the start")
    finally:
        await stop(p, web, tasks, watch)
    os.environ[PAUSED] = json.dumps([owner for owner, why in p.paused.items() if why == BY_ADMIN])
    return died.is_set() and not stopped.is_set()


async def keep_running(p: Program, name: str, work: Callable[[Program], Awaitable[None]]) -> None:
    """Restart a background task after an error: a row that can't be read must not end the program."""
    while True:
        try:
            return await work(p)
        except trainer.Stopped:
            raise
        except swap.EngineDied as e:
            print(e, file=sys.stderr)
            p.died.set()
            return
        except Exception as e:
            traceback.print_exception(e)
            if name == "train":
                work = train_again
                p.stop_training(f"{type(e).__name__}: {e}", 60)
            await asyncio.sleep(1)


async def train_again(p: Program) -> None:
    """`train` once more, after an error that it did not handle, such as an undo that failed. EngineDied if it fails
    again, on a broken GPU for example: then the program starts again from its last checkpoint."""
    while p.paused.get("") not in (None, OFF):
        await asyncio.sleep(1)
    async with p.stepping:
        try:
            for state in p.states.values():
                await p.undo(state)
        except Exception as e:
            raise swap.EngineDied(f"the last step can't be undone: {type(e).__name__}: {e}") from e
        await p.write(journal.requeue, "its step could not be undone at once")
    await train(p)


def on_signal(number: int, stopped: asyncio.Event) -> None:
    """Ask for a clean stop."""
    print(f"stopped by {signal.Signals(number).name}", flush=True)
    stopped.set()


async def stop(p: Program, web: WebServer, tasks: list[asyncio.Task], watch: asyncio.Task) -> None:
    """Stop the server and all tasks, then write checkpoints. A running swap is finished first; a running step is
    abandoned at its next row."""
    print("stopping", flush=True)
    async with swap.swapping:
        p.state.stopping.set()  # the users' states share this event
        web.should_exit = True
        for task in tasks[1:]:  # the server ends by itself
            task.cancel()
    async with p.stepping:  # an admin's rollback is finished first
        shutdown = asyncio.create_task(asyncio.to_thread(swap.stop_engine, p.engine))
    await asyncio.gather(*tasks, return_exceptions=True)
    await p.on_trainer(lambda: None)  # wait for a `commit` that has begun, so that its step is in the checkpoint
    try:
        await asyncio.wait_for(p.write(journal.leave_step), LOCK_WAIT_S)
    except TimeoutError:
        why = "another program is writing to the journal; the next start repeats the steps since the last checkpoint"
        for state in p.states.values():
            print(f"no checkpoint of step {state.step}: {why}", file=sys.stderr)
    else:
        for state in p.states.values():
            await p.save(state)
    await shutdown
    watch.cancel()


async def main(config: Config) -> bool:
    """Run the program; True if the engine died and a restart may help."""
    for s in STOPPING:  # as plain handlers: starting the engine blocks the event loop
        signal.signal(s, lambda *_: sys.exit("stopped while starting"))
    p = await setup(config)
    try:
        return await serve(p)
    finally:
        swap.stop_engine(p.engine)
        for threads in (p.trainer, p.judging):
            threads.shutdown(wait=False, cancel_futures=True)
        p.db.close()
        p.lock.close()


def unbreakable(stream: TextIO) -> None:
    """Let no write to a stream fail: a full disk under the log, or a terminal or pipe that is gone, must not end the
    program or prevent a checkpoint."""

    def attempt(f: Callable) -> Callable:
        def attempted(*args: Any) -> Any:
            with suppress(OSError):
                return f(*args)

        return attempted

    stream.write, stream.flush = attempt(stream.write), attempt(stream.flush)


if __name__ == "__main__":
    unbreakable(sys.stdout)
    unbreakable(sys.stderr)
    try:
        start_again = asyncio.run(main(parse(sys.argv[1:])))
    except UsageError as e:
        sys.exit(str(e))
    if start_again:
        print("the engine died; starting again from the last checkpoint", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv])
