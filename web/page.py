"""The page at `/`: its files, which hold no data, and what it reads, behind the same keys as /status.

A user's key sees that user's turns. The page's buttons use POST /v1/feedback, /admin/COMMAND and /web/leave_out."""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from clients.bodies import openai_error
from clients.keys import sees_all
from durable import journal, look
from program import Program
from web import learned, turns
from web.why import why_nothing

HERE = Path(__file__).parent
FILES = {"/": "page.html", "/web/page.js": "page.js", "/web/page.css": "page.css"}
FILES |= {"/web/uPlot.js": "uPlot.iife.min.js", "/web/uPlot.css": "uPlot.min.css"}
HEADERS = {
    # Own files alone, and no script or style inside the page: a conversation's text can't run.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
EVERY = 1.0  # seconds between two looks for something new
RECENT = 20  # newest turns that say why nothing is training


def glance(db: sqlite3.Connection, p: Program, user: str | None, training: dict[str, Any]) -> dict[str, Any]:
    """What the page shows at a glance, and what `why_nothing` is answered from. `training`: `Program.training_of`, and
    the journal's version."""
    failing = p.judge_health.failing
    newest = look.rows(db, "state, reason, no_rl", look.newest(db, RECENT, user=user))
    now = {
        "model": p.config.name,
        "folder": Path(p.config.model).name or "SmolLM2-135M-Instruct",
        "stepping": p.stepping.locked(),
        "judge_error": p.judge_health.error if failing else "",
        "disk_full": not journal.has_disk_space(db),
        "turns": journal.counts(db, user),
        "dropped": journal.drop_reasons(db, user),
        "newest": [dict(r) for r in newest],
        "together": together(db, p, user),
        "checkpoints": journal.checkpoints(db, "") if user is None else [],
        "pause_s": p.pause[1] - p.pause[0],
        "admin": user is None,
    }
    now |= training
    return now | {"why": why_nothing(now)}


def together(db: sqlite3.Connection, p: Program, user: str | None) -> int:
    """The most judged turns that one batch could be of: a batch changes the weights of one owner."""
    if user is not None or p.config.adapters == "shared":
        return journal.counts(db, user).get("queued", 0)
    queued = db.execute("SELECT user, n FROM counters WHERE state = 'queued'").fetchall()
    return max((r["n"] for r in queued if r["user"] not in p.paused), default=0)


def answer(found: Any) -> Response:
    """As ASCII: half a surrogate pair, which a client's cut text may end in, has no UTF-8."""
    return Response(json.dumps(found), media_type="application/json", headers=HEADERS)


def whose(request: Request) -> str | None:
    """Whose turns a request may see; None: everybody's."""
    user = request.scope["state"]["user"]
    return None if sees_all(user) else user.name


def number_of(request: Request) -> int:
    """The turn that is named in the path; 0, which no turn has, for what is no number of SQLite's."""
    text = request.path_params["number"]
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0


def routes(p: Program) -> list[Route]:
    path = Path(p.config.out) / "journal.db"
    reading = ThreadPoolExecutor(1, "page")  # one: what pages read takes no more than this from serving

    async def in_thread(read: Callable, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with closing(turns.connect(path)) as db:
                db.execute("BEGIN")  # one view of all tables: `forget` may run beside it
                return read(db, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(reading, run)

    async def events(request: Request) -> StreamingResponse:
        user = whose(request)

        async def stream() -> AsyncIterator[str]:
            last, silent = None, 0
            while not p.state.stopping.is_set():
                training = p.training_of(user) | {"version": p.db.total_changes}
                now = await in_thread(glance, p, user, training)
                silent = silent + 1 if now == last else 0
                if now != last:
                    yield f"data: {json.dumps(now)}\n\n"
                elif silent % 15 == 0:  # a client that hung up is noticed by this
                    yield ": nothing new\n\n"
                last = now
                await asyncio.sleep(EVERY)

        return StreamingResponse(stream(), media_type="text/event-stream", headers=HEADERS)

    async def listed(request: Request) -> Response:
        asked, user = request.query_params, whose(request)
        where = {name: asked.get(name) or None for name in ("user", "session", "state")}
        where["user"] = where["user"] if user is None else user
        try:
            where["before"] = float(asked.get("before") or 0)
        except ValueError:
            return openai_error(400, "before: expected a time in seconds")
        if where["state"] not in (None, *look.STATES):
            return openai_error(400, f"state: expected one of {', '.join(look.STATES)}")
        return answer(await in_thread(turns.listed, **where))

    async def tokens(request: Request) -> Response:
        number = number_of(request)
        found = await in_thread(turns.tokens, p.state.tokenizer, number, whose(request))
        return answer(found) if found else openai_error(404, f"no turn {number} of yours")

    async def curves(request: Request) -> Response:
        user = whose(request)
        owner = p.owner_of(user) if user else ""
        if user is None and p.config.adapters == "user":
            return answer({"pleased": await in_thread(turns.pleased, user), "steps": []})  # many curves in one
        steps = lambda db: turns.steps(path.with_name("metrics.jsonl"), user is None, owner)  # noqa: E731
        found = {"pleased": await in_thread(turns.pleased, user), "steps": await in_thread(steps)}
        return answer(found)

    async def leave_out(request: Request) -> Response:
        try:
            session = str(json.loads(await request.body())["session"])
        except (ValueError, KeyError, TypeError):
            return openai_error(400, 'expected {"session": ...}')
        count = await journal.patiently(journal.leave_out, p.db, session, whose(request))
        return answer({"done": f"{count} answers of this conversation will not be trained on"})

    return [
        *[Route(at, lambda _, name=name: FileResponse(HERE / name, headers=HEADERS)) for at, name in FILES.items()],
        Route("/web/events", events),
        Route("/web/turns", listed),
        Route("/web/turns/{number}", tokens),
        Route("/web/curves", curves),
        Route("/web/leave_out", leave_out, methods=["POST"]),
        *learned_routes(p, in_thread),
    ]


def learned_routes(p: Program, in_thread: Callable) -> list[Route]:
    one_at_a_time = asyncio.Lock()

    async def rules(request: Request) -> Response:
        user = whose(request)
        asked_for = request.query_params.get("user") or None
        return answer(await in_thread(look.rules, asked_for if user is None else user))

    async def replay(request: Request) -> Response:
        number = number_of(request)
        async with one_at_a_time:
            try:
                found = await in_thread(learned.complaint_about, number, whose(request))
                if found is None:
                    return openai_error(404, f"no turn {number} of yours with a complaint")
                return answer(await learned.replay(p, *found))
            except (KeyError, ValueError) as e:
                return openai_error(400, f"it can't be asked again: {e}")

    return [Route("/web/learned", rules), Route("/web/learned/{number}", replay)]
