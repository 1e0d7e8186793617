"""Admin commands to the running program (`POST /admin/COMMAND`), and our metrics at /metrics next to vLLM's.

The same commands on the command line: python -m durable.admin --help.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import grpo
import swap
import trainer
from clients.bodies import openai_error, parse
from clients.keys import ADMIN, ANYBODY, OURS
from durable import checkpoint, journal, upkeep
from durable.errors import UsageError
from program import BY_ADMIN, OFF, Program


async def roll_back(p: Program, user: str, step: int) -> str:
    """Continue from the checkpoint of `step` (0: from the starting weights); UsageError if there is none."""
    async with p.stepping:
        owner = upkeep.check_owner(p.db, user)
        upkeep.check_step(p.db, owner, step)
        was_away = owner not in p.states
        state, out = await p.state_of(owner, step), Path(p.config.out)
        folder = checkpoint.folder_of(out, owner, step)
        try:
            _, baselines, _ = await p.on_trainer(trainer.load_checkpoint, state, folder)
            weights = await p.on_trainer(trainer.served_weights, state.policy)
            await swap.begin_load(p.engine, weights)
            probed, logps = await p.on_trainer(state.probe.measure, state.policy)
            _, p.pause = await swap.push(p.engine, weights, step, (state.probe.ids, logps), owner)
            undone = await p.write(upkeep.rollback, owner, step)
        except Exception:
            if was_away:  # their current weights are still those on the disk
                del p.states[owner]
                await swap.evict(p.engine, owner)
            else:
                await p.undo(state)
            raise
        await p.on_trainer(trainer.commit, state, step, baselines, probed)
        checkpoint.remove_others(out, journal.listed(p.db))
        checkpoint.trim_metrics(out / "metrics.jsonl", p.steps())
        await p.unload_states()
    return upkeep.rolled_back(step, undone)


async def run_command(p: Program, command: str, body: dict[str, Any]) -> str:
    """Carry out a command; returns what to tell the admin. UsageError if it is refused, KeyError if it is unknown."""
    user = body.get("user", "")
    if p.training == OFF and command in ("pause", "resume", "train"):
        raise UsageError(f"training has ended: --steps={p.config.steps} is reached")
    if command in ("pause", "resume") and user:
        upkeep.check_owner(p.db, user)
    if command == "pause":
        p.paused[user] = BY_ADMIN
        return "training pauses after the current step; serving and judging continue"
    if command == "resume":
        p.paused = {owner: why for owner, why in p.paused.items() if user and owner != user}
        p.wake.set()
        return "training is on" if p.training == "on" else f"training of {user} resumes when training as a whole does"
    if command == "train":
        p.train_now = True
        p.wake.set()
        return "the next step starts now, with the turns judged so far"
    if command == "rollback":
        return await roll_back(p, user, body["step"])
    if command == "forget":
        async with p.stepping:
            journal_file = Path(p.config.out) / "journal.db"
            said = await asyncio.to_thread(upkeep.forget, journal_file, body.get("session", ""), user)
            if owner := p.owner_of(user):
                # Train and answer this user from the starting weights again.
                p.states.pop(owner, None)
                p.paused.pop(owner, None)
                await swap.make_newest(p.engine, owner, swap.Version(0))
                # An answer by the adapter may have been recorded meanwhile: drop it. Running ones: see `Recorder`.
                await p.write(upkeep.rollback, owner, 0)
        for from_tool in (False, True):
            p.state.baselines.pop(grpo.baseline_key(user, from_tool), None)
        return said
    raise KeyError(command)


def may_command(request: Request) -> bool:
    """Only the admin, or the server's own page if no key is needed; browsers set Sec-Fetch-Site, and other sites can't
    forge it. (`why_not_keyless` refuses DNS rebinding.) Other programs on this machine can send it, but they can also
    talk and rate without a key."""
    user, site = request.state.user, request.headers.get("sec-fetch-site")
    own_page = user is ANYBODY and site == "same-origin" and request.path_params["command"] != "forget"
    return user is OURS or own_page


def routes(p: Program) -> list[Route]:
    async def answer(request: Request) -> JSONResponse:
        if not may_command(request):
            return openai_error(403, f"this needs the key in {p.keys.file.with_name(ADMIN)}")
        try:
            body = await asyncio.to_thread(parse, await request.body() or b"{}")
            # A client that hangs up must not leave a command half done.
            said = await asyncio.shield(run_command(p, request.path_params["command"], body))
        except UsageError as e:
            return openai_error(400, str(e))
        except swap.EngineDied as e:
            p.died.set()
            return openai_error(500, str(e), "server_error")
        except swap.PushError as e:
            p.stop_training(str(e))
            return openai_error(500, f"the engine keeps the weights that it had: {e}", "server_error")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            return openai_error(400, f"unknown command or wrong field: {e!r}")
        return JSONResponse({"done": said})

    async def metrics(request: Request) -> Response:
        # vLLM's own are in the default registry of our process.
        return Response(generate_latest() + generate_latest(Metrics(p)), media_type=CONTENT_TYPE_LATEST)

    return [Route("/admin/{command}", answer, methods=["POST"]), Route("/metrics", metrics, methods=["GET"])]


class Metrics:
    """A collector of prometheus_client: it is asked at each scrape."""

    def __init__(self, p: Program) -> None:
        self.p = p

    def collect(self) -> Iterator[Metric]:
        p, prefix = self.p, "openclaw_rl_"
        yield GaugeMetricFamily(prefix + "training", "1: on, 0: it waits, is paused or stopped", p.training == "on")
        yield GaugeMetricFamily(prefix + "step", "Steps of the weights that are served", sum(p.steps().values()))
        yield GaugeMetricFamily(prefix + "swap_pause_seconds", "Pause of the last swap", p.pause[1] - p.pause[0])
        failures = p.judge_health.failures
        yield CounterMetricFamily(prefix + "judge_failures", "Verdicts that the judge failed to give", failures)
        for name, what, label, values in (
            ("turns", "Turns by state", "state", journal.counts(p.db)),
            ("dropped_turns", "Dropped turns by reason", "reason", journal.drop_reasons(p.db)),
            ("last_step", "Metrics of the last step, see docs/method.md", "key", p.last_step),
        ):
            family = GaugeMetricFamily(prefix + name, what, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family
