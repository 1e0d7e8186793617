"""What the parts of the running program share: the options, the journal, the engine, the queues between them."""

import asyncio
import secrets
import socket
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import openai
from openai import AsyncOpenAI

import lora
import reward
import swap
import trainer
from clients.connections import trusting
from clients.keys import Keys
from config import Config
from durable import checkpoint, journal
from durable.journal import Verdict
from machine import memory
from machine.plan import bind_thread


@dataclass
class Program:
    """What the parts of the running program share."""

    config: Config
    lock: TextIO  # on config.out
    db: sqlite3.Connection
    listener: socket.socket
    keys: Keys
    url: str  # of this server
    engine_args: Any
    engine: Any
    state: trainer.State  # of the weights that all share; with --adapters=user the state that each user's begins as
    trainer_cores: list[int]
    trainer: ThreadPoolExecutor  # one thread
    judging: ThreadPoolExecutor  # one thread
    fitting: "Future[reward.Head] | None"  # of a small model's judge
    own_key: str = field(default_factory=lambda: secrets.token_urlsafe(24))  # of our own requests: not recorded
    to_judge: "asyncio.Queue[str]" = field(default_factory=asyncio.Queue)  # ids of turns that have a next message
    to_train: "asyncio.Queue[str]" = field(default_factory=asyncio.LifoQueue)  # ids of judged turns, newest first
    judge_health: reward.Health = field(default_factory=reward.Health)
    users: dict[str, trainer.State] = field(default_factory=dict)  # of their own adapters, the last trained last
    paused: dict[str, str] = field(default_factory=dict)  # users whose adapter is not trained, and why
    training: str = "on"  # or why it waits or stopped
    resumed: asyncio.Event = field(default_factory=asyncio.Event)  # unset: no step begins
    stepping: asyncio.Lock = field(default_factory=asyncio.Lock)  # held during a step
    died: asyncio.Event = field(default_factory=asyncio.Event)  # the engine: nothing can be served any more
    last_step: dict[str, float] = field(default_factory=dict)  # its metrics
    pause: tuple[float, float] = (0.0, 0.0)  # when the last swap's pause began and ended, time.time()

    def __post_init__(self) -> None:
        swap.served = self.state.step
        self.resumed.set()

    def owner_of(self, user: str) -> str:
        """Whose weights answer this user: "" for those that all share. An owner has a state, steps and checkpoints."""
        return user if self.config.adapters == "user" else ""

    def state_in_memory(self, owner: str) -> trainer.State | None:
        return self.users.get(owner) if owner else self.state

    async def state_of(self, owner: str, step: int | None = None) -> trainer.State:
        """The state of an owner's weights. Where it is not in memory, it is new, or read from their current checkpoint
        or that of `step`. Hold `stepping`.

        UsageError where the checkpoint is damaged."""
        if owner:
            state = self.users.pop(owner, None)
            if state is None:
                step = journal.saved_step(self.db, owner) if step is None else step
                folder = checkpoint.folder_of(Path(self.config.out), owner, step)
                state = await self.on_trainer(trainer.of_user, self.config, self.state, owner, folder)
            self.users[owner] = state
        return self.state_in_memory(owner)

    def step_of(self, owner: str) -> int:
        state = self.state_in_memory(owner)
        return state.step if state else journal.saved_step(self.db, owner)

    def steps(self) -> dict[str, int]:
        """By owner."""
        in_memory = {state.owner: state.step for state in self.users.values()}
        return journal.owners(self.db) | in_memory if self.config.adapters == "user" else {"": self.state.step}

    async def bring(self, user: str) -> None:
        """Have the user's adapter in the engine, from the disk if they were away. Await nothing between this and the
        answer: others may have it put away again.

        UsageError where the checkpoint is damaged."""
        owner = self.owner_of(user)
        while True:  # who asked last is last in `newest`
            idle = [other for other in swap.newest if other not in ("", owner) and other not in self.users]
            if len(idle) < memory.USERS:
                break
            await swap.put_away(self.engine, idle[0])
        while owner not in swap.newest:
            adapter = None
            if step := journal.saved_step(self.db, owner):
                folder = checkpoint.folder_of(Path(self.config.out), owner, step)
                try:
                    weights = await asyncio.to_thread(lora.read, folder)
                except FileNotFoundError:
                    if step != journal.saved_step(self.db, owner):
                        continue  # undone or forgotten meanwhile
                    raise
                adapter = await swap.add_adapter(self.engine, weights, step)
            # Meanwhile a newer one may have been pushed, or this one undone or forgotten.
            if owner not in swap.newest and step == journal.saved_step(self.db, owner):
                await swap.make_newest(self.engine, owner, adapter)
            elif adapter:
                await swap.remove_unused(self.engine, adapter)
        if owner:
            swap.newest[owner] = swap.newest.pop(owner)

    async def forget_adapter(self, owner: str) -> None:
        """Train and answer this user from the first weights again. Hold `stepping`."""
        self.users.pop(owner, None)
        self.paused.pop(owner, None)
        await swap.make_newest(self.engine, owner, None)

    def on_trainer(self, f: Callable, *args: Any) -> Awaitable[Any]:
        """Run f(*args) on the trainer's thread, while serving and judging continue."""
        return asyncio.get_running_loop().run_in_executor(self.trainer, f, *args)

    async def undo(self, state: trainer.State) -> None:
        """After a step that failed: the trainer, and the engine if it has new weights, return to the last snapshot."""
        await self.on_trainer(trainer.restore, state)
        if swap.served_step(self.engine, state.owner) != state.step:
            weights = await self.on_trainer(trainer.served_weights, state.policy)
            await swap.give_back(self.engine, weights, state.step, state.owner)

    async def save(self, state: trainer.State) -> None:
        """A checkpoint, if there is something new. Where it can't be written, the next step tries again."""
        out, owner, step = Path(self.config.out), state.owner, state.step
        if step == journal.saved_step(self.db, owner):
            return
        size = trainer.saved_bytes(state) + journal.RESERVE
        try:
            folder = checkpoint.folder_of(out, owner, step)
            await self.on_trainer(checkpoint.write, folder, size, lambda folder: trainer.save(state, folder))
        except checkpoint.CheckpointError as e:
            print(f"no checkpoint of step {step}: {e}", file=sys.stderr)
            return
        await journal.patiently(journal.add_checkpoint, self.db, owner, step, self.config.keep)
        await self.on_trainer(checkpoint.remove_others, out, journal.listed(self.db))

    async def save_absent(self) -> None:
        """The states of users who were trained longest ago leave the memory when there are too many."""
        for owner, state in list(self.users.items())[: -memory.USERS]:
            await self.save(state)
            if state.step == journal.saved_step(self.db, owner):
                del self.users[owner]

    def new_trainer_thread(self) -> None:
        """After a lack of memory, oneDNN can't make new kernels in the same thread ("could not create a primitive"), so
        use a new one. MemoryError while memory is still short: Python would wait for ever for a thread that can't
        start."""
        bytearray(64 << 20)
        self.trainer.shutdown(wait=False)
        self.trainer = ThreadPoolExecutor(1, "train", bind_thread, (self.trainer_cores,))

    def pause_training(self, why: str, owner: str = "") -> None:
        """No step of this owner's weights begins from here on; one that runs is finished. "": of anybody's."""
        if owner:
            self.paused[owner] = why
        else:
            self.training = why
            self.resumed.clear()

    def resume_training(self, owner: str = "") -> None:
        """ "": of everybody's weights."""
        if self.paused.pop(owner, None) if owner else self.paused:
            for turn_id in journal.in_state(self.db, "queued"):  # `next_batch` left them out
                self.to_train.put_nowait(turn_id)
        if not owner:
            self.paused.clear()
            self.try_again()

    def try_again(self) -> None:
        """Training goes on, but for users whose own is paused."""
        self.training = "on"
        self.resumed.set()

    def stop_training(self, error: str, seconds: float | None = None, owner: str = "") -> None:
        """After a failed step, with a new try after some seconds; None: not before somebody resumes it."""
        again = "resume it by python -m durable.admin resume" if seconds is None else f"next try in {seconds:.0f} s"
        self.pause_training(f"stopped: {error} ({again})", owner)
        whose = f"of {owner} " if owner else ""
        step = self.step_of(owner)
        print(f"training {whose}stopped, serving continues with step {step}: {error} ({again})", file=sys.stderr)
        if seconds is not None:
            stopped = self.training
            asyncio.get_running_loop().call_later(seconds, lambda: self.training == stopped and self.try_again())

    @property
    def origins(self) -> list[str]:
        return [origin.strip().rstrip("/") for origin in self.config.origins.split(",") if origin.strip()]

    @cached_property
    def own_client(self) -> AsyncOpenAI:
        """A client of this server, for the judge and the hinted prompts. Ignores proxies of the environment."""
        http = openai.DefaultAsyncHttpxClient(trust_env=False, verify=trusting(self.config.ssl_certfile))
        return AsyncOpenAI(base_url=self.url, api_key=self.own_key, http_client=http)

    async def on_next(self, turn_id: str) -> None:
        """The server calls this when a conversation continued from a turn."""
        await self.enqueue(self.to_judge, turn_id)

    async def on_confirmed(self, turn_id: str) -> None:
        """The server calls this when it is certain what a turn is judged by."""
        if journal.is_queued(self.db, turn_id):
            self.to_train.put_nowait(turn_id)

    async def on_feedback(self, turn_id: str, verdict: Verdict) -> None:
        """The server calls this when a user rates a turn. ValueError where that comes too late."""
        if await journal.patiently(journal.record_verdict, self.db, turn_id, verdict):
            await self.enqueue(self.to_train, turn_id)

    async def enqueue(self, queue: "asyncio.Queue[str]", turn_id: str) -> None:
        if journal.pending(self.db) > (most := self.config.max_waiting):
            why_not = f"more than {most} turns wait for the judge or the trainer"
            await journal.patiently(journal.drop, self.db, [turn_id], why_not)
        else:
            queue.put_nowait(turn_id)

    def training_of(self, user: str | None) -> dict[str, Any]:
        """How far the weights that answer this user are, or everybody's."""
        steps = self.steps()
        mine = {self.owner_of(user): self.step_of(self.owner_of(user))} if user else steps
        paused = self.paused.get(user) if user and self.training == "on" else None
        return {
            "step": sum(mine.values()),
            **({"steps": mine, "paused": self.paused} if self.config.adapters == "user" and not user else {}),
            "training": paused or self.training,
            "batch_size": self.config.batch_size,
            "pause": self.pause,
        }

    def status(self, user: str | None) -> dict[str, Any]:
        """What GET /status shows: this user's turns, or everybody's."""
        turns = {"turns": journal.counts(self.db, user), "dropped": journal.drop_reasons(self.db, user)}
        return self.training_of(user) | turns

    async def wait_for_disk_space(self) -> None:
        """Training writes down what it does: it waits while there is no space for that."""
        full = "waits: the disk is full"
        while not journal.has_disk_space(self.db):
            if self.training == "on":
                self.training = full
            await asyncio.sleep(1)
        if self.training == full:  # otherwise it was paused meanwhile
            self.training = "on"
