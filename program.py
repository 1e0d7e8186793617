"""The state that the parts of the running program share: options, journal, engine, training states."""

import asyncio
import socket
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import openai

import lora
import reward
import swap
import trainer
from clients.connections import trusting
from clients.endpoint import Health
from clients.keys import Keys
from config import Config
from durable import checkpoint, journal
from machine import memory
from machine.plan import Plan, bind_thread

BY_ADMIN, OFF = "paused by the admin", "off"  # in `Program.paused`; off: --steps is reached
PAUSED = "NANO_OPENCLAW_RL_PAUSED"  # the admin's pauses, for the program that starts after the engine died


@dataclass
class Program:
    """The shared state of the running program: one object per process."""

    config: Config
    lock: TextIO  # on config.out
    db: sqlite3.Connection
    listener: socket.socket
    keys: Keys
    engine_args: Any
    engine: Any
    states: dict[str, trainer.State]  # by owner of the weights, see `owner_of`; the last trained is last
    plan: Plan
    trainer: ThreadPoolExecutor  # one thread
    judging: ThreadPoolExecutor  # one thread
    fitting: "Future[reward.Head] | None"  # the head of a small model's judge; None for a chat judge
    to_judge: "asyncio.Queue[str]" = field(default_factory=asyncio.Queue)  # ids of turns with a next message
    # Turn id -> when it was judged, by the event loop's clock. In the future: until then its verdict may still change.
    judged_at: dict[str, float] = field(default_factory=dict)
    train_now: bool = False  # the next step doesn't wait for a full batch
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # set when there may be a batch for the next step
    judge_health: Health = field(default_factory=Health)
    paused: dict[str, str] = field(default_factory=dict)  # owner -> why no step may begin; "": for any owner
    stepping: asyncio.Lock = field(default_factory=asyncio.Lock)  # held during a step
    started: float = field(default_factory=time.time)
    died: asyncio.Event = field(default_factory=asyncio.Event)  # set when the engine has died
    last_step: dict[str, float] = field(default_factory=dict)  # metrics of the last step
    pause: tuple[float, float] = (0.0, 0.0)  # when the last swap's pause began and ended, time.time()

    @property
    def state(self) -> trainer.State:
        """The shared weights. With --adapters=user: the starting weights, from which each user's adapter begins."""
        return self.states[""]

    def owner_of(self, user: str) -> str:
        """Whose weights answer this user; "" for the shared ones. An owner has a state, steps and checkpoints."""
        return user if self.config.adapters == "user" else ""

    async def state_of(self, owner: str, step: int | None = None) -> trainer.State:
        """The state of an owner's weights. If it is not in memory, it is loaded from their current checkpoint or that
        of `step`, or begins at the starting weights. The caller must hold `stepping`.

        UsageError if the checkpoint is damaged."""
        if owner not in self.states:
            step = journal.saved_step(self.db, owner) if step is None else step
            folder = checkpoint.folder_of(Path(self.config.out), owner, step)
            self.states[owner] = await self.on_trainer(trainer.of_user, self.config, self.state, owner, folder)
        self.states[owner] = self.states.pop(owner)  # the last trained is last
        return self.states[owner]

    def steps(self) -> dict[str, int]:
        """Owner -> the step of their weights. An owner missing here has the starting weights, step 0."""
        if self.config.adapters == "shared":
            return {"": self.state.step}
        return journal.owners(self.db) | {owner: state.step for owner, state in self.states.items() if owner}

    async def load_adapter(self, user: str) -> None:
        """Load the user's adapter into the engine, unless it is there. If there are too many, idle ones are evicted.
        Await nothing between this call and `generate`: another request might evict it again.

        UsageError if the checkpoint is damaged."""
        owner = self.owner_of(user)
        # `serving` is ordered by last request, least recently used first.
        while len(idle := [other for other in swap.serving if other not in (owner, *self.states)]) >= memory.USERS:
            await swap.evict(self.engine, idle[0])
        while owner not in swap.serving:
            # A client that hangs up must not end this: the engine would keep an adapter that nobody knows of.
            await asyncio.shield(self.load_saved(owner))
        swap.serving[owner] = swap.serving.pop(owner)

    async def load_saved(self, owner: str) -> None:
        """Load an owner's saved adapter, or the starting weights, into the engine."""
        version = swap.Version(0)
        if step := journal.saved_step(self.db, owner):
            folder = checkpoint.folder_of(Path(self.config.out), owner, step)
            try:
                weights = await asyncio.to_thread(lora.read, folder)
            except FileNotFoundError:
                if step != journal.saved_step(self.db, owner):
                    return  # reverted or forgotten meanwhile
                raise
            version = await swap.add_adapter(self.engine, weights, step)
        # Meanwhile a newer one may have been pushed, or this one reverted or forgotten.
        if owner not in swap.serving and step == journal.saved_step(self.db, owner):
            await swap.make_newest(self.engine, owner, version)
        else:
            await swap.remove_unused(self.engine, version)

    def on_trainer(self, f: Callable, *args: Any) -> Awaitable[Any]:
        """Run f(*args) on the trainer's thread, while serving and judging continue."""
        return asyncio.get_running_loop().run_in_executor(self.trainer, f, *args)

    def write(self, change: Callable, *args: Any) -> Awaitable[Any]:
        """Run change(db, *args), a function that writes to the journal, in its own transaction: `journal.patiently`."""
        return journal.patiently(change, self.db, *args)

    async def undo(self, state: trainer.State) -> None:
        """After a failed step: the trainer, and the engine if it got new weights, return to the last snapshot."""
        await self.on_trainer(trainer.restore, state)
        if state.owner in swap.serving and swap.served_step(state.owner) != state.step:
            weights = await self.on_trainer(trainer.served_weights, state.policy)
            await swap.restore_weights(self.engine, weights, state.step, state.owner)
            await self.write(journal.drop_newer, state.owner, state.step, self.started)

    async def save(self, state: trainer.State) -> None:
        """Write a checkpoint if there is something new. If that fails, the next step tries again."""
        out, owner, step = Path(self.config.out), state.owner, state.step
        if step == journal.saved_step(self.db, owner):
            return
        # Per weight: one bf16 and three fp32 numbers
        size = 14 * sum(m.numel() for m in state.masters) + journal.RESERVE
        try:
            folder = checkpoint.folder_of(out, owner, step)
            await self.on_trainer(checkpoint.write, folder, size, lambda folder: trainer.save(state, folder))
        except checkpoint.CheckpointError as e:
            print(f"no checkpoint of step {step}: {e}", file=sys.stderr)
            return
        await self.write(journal.add_checkpoint, owner, step, self.config.keep)
        await self.on_trainer(checkpoint.remove_others, out, journal.listed(self.db))

    async def unload_states(self) -> None:
        """If too many users' states are in memory, save and unload those trained longest ago."""
        for owner in [owner for owner in self.states if owner][: -memory.USERS]:
            await self.save(self.states[owner])
            if self.states[owner].step == journal.saved_step(self.db, owner):
                del self.states[owner]

    def new_trainer_thread(self) -> None:
        """Replace the trainer's thread: after running out of memory, oneDNN can't create kernels in the old one ("could
        not create a primitive").

        MemoryError if memory is still short. Without that check Python would wait forever for the thread to start."""
        bytearray(64 << 20)
        self.trainer.shutdown(wait=False)
        self.trainer = ThreadPoolExecutor(1, "train", bind_thread, (self.plan.trainer_cores,))

    def end_pause(self, why: str) -> None:
        """Resume training if it is still paused for this reason. Users who are paused alone stay paused."""
        if self.paused.get("") == why:
            del self.paused[""]
            self.wake.set()

    def stop_training(self, error: str, seconds: float | None = None, owner: str = "") -> None:
        """Pause training of one owner, or of all (""), for `seconds` or until the admin resumes it (None)."""
        if self.training == OFF:  # no step would begin anyway
            return
        again = f"resume it with python -m durable.admin resume --out={self.config.out}"
        if seconds is not None:
            again = f"next try in {seconds:.0f} s"
        why = f"stopped: {error} ({again})"
        if self.paused.get(owner) != BY_ADMIN:
            self.paused[owner] = why
        whose = f"of {owner} " if owner else ""
        step = f" with step {self.steps().get(owner, 0)}" if owner or self.config.adapters == "shared" else ""
        print(f"training {whose}stopped, serving continues{step}: {error} ({again})", file=sys.stderr)
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self.end_pause, why)

    @cached_property
    def own_client(self) -> openai.AsyncOpenAI:
        """A client of this server, for the judge and the hinted prompts. Ignores proxies of the environment."""
        http = openai.DefaultAsyncHttpxClient(trust_env=False, verify=trusting(self.config.ssl_certfile))
        return openai.AsyncOpenAI(base_url=self.config.url, api_key=self.keys.own, http_client=http)

    async def admit(self, turn_id: str, user: str) -> bool:
        """Whether a user's turn may wait for the judge and the trainer. If more than --max_waiting turns for the same
        weights wait, it is dropped."""
        turns, most = journal.counts(self.db, self.owner_of(user) or None), self.config.max_waiting
        if full := turns.get("judging", 0) + turns.get("queued", 0) > most:
            why_not = f"more than {most} turns wait for the judge or the trainer"
            await self.write(journal.drop, [turn_id], why_not)
        return not full

    @property
    def training(self) -> str:
        """ "on"; "off" once --steps is reached; otherwise why training waits or has stopped."""
        return self.paused.get("", "on")

    async def wait_for_disk_space(self) -> None:
        """Verdicts and training need disk space for their records, so wait until there is some."""
        full = "waits: the disk is full"
        while not journal.has_disk_space(self.db):
            self.paused.setdefault("", full)
            await asyncio.sleep(1)
        self.end_pause(full)
