"""The page at `/`: its files, which hold no data, and what it reads, behind the same keys as /status.

A user's key sees that user's turns. The page's buttons use POST /v1/feedback, /admin/COMMAND and /web/leave_out."""

import asyncio
import json
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from clients.bodies import openai_error, parse
from clients.keys import sees_all
from durable import journal, look
from program import Program
from web import learned, turns
from web.feedback import together, training_of
from web.why import why_nothing

HERE = Path(__file__).parent
FILES = {  # few, since each request takes a browser some ms; page.js comes before uPlot for its "use strict"
    "/": ("text/html", "page.html"),
    "/web/page.js": ("text/javascript", "page.js", "uPlot.iife.min.js"),
    "/web/page.css": ("text/css", "uPlot.min.css", "page.css"),
}
HEADERS = {
    # Only our own files; no inline script or style: text of a conversation can't run.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NOT_KEPT = HEADERS | {"Cache-Control": "no-store"}  # conversations, which may be forgotten later
EVERY = 1.0  # seconds between two looks for something new
REDRAWN = 5.0  # seconds between two drawings of the curves
MAX_ASKING = 4  # requests of one user that are asked again at the same time
RECENT = 20  # newest turns that `why_nothing` looks at


def glance(db: sqlite3.Connection, p: Program, user: str | None, training: dict[str, Any]) -> dict[str, Any]:
    """What the page shows first; also the input of `why_nothing`. `training`: `training_of`, the journal's version,
    and whether the admin is asking."""
    failing, error = p.judge_health.failing, p.judge_health.error
    newest = look.rows(db, "state, reason, no_rl", look.newest(db, RECENT, user=user))
    now = {
        "model": p.config.name,
        "folder": Path(p.config.model).name or "SmolLM2-135M-Instruct",
        "user": user,
        "owner": p.owner_of(user or ""),
        "stepping": p.stepping.locked()
        and "training" in journal.counts(db, p.owner_of(user or "") or None),  # not in a rollback or `forget`
        # After the first colon it may quote what the judge was sent, which can be another user's turn.
        "judge_error": (error if training["admin"] else error.partition(": ")[0]) if failing else "",
        "disk_full": not journal.has_disk_space(db),
        "turns": journal.counts(db, user),
        "dropped": journal.drop_reasons(db, user),
        "newest": [dict(r) for r in newest],
        "together": together(db, p, user),
        "checkpoints": journal.checkpoints(db, p.owner_of(user or "")) if training["admin"] else [],
        "batch_wait": p.config.batch_wait,
        "pause_s": p.pause[1] - p.pause[0],
    }
    now |= training
    return now | {"why": why_nothing(now)}


def curves(db: sqlite3.Connection, p: Program, user: str | None, admin: bool) -> dict[str, Any]:
    """The curves of one user or of all users. With an adapter per user there are no step curves for all."""
    owner, steps = p.owner_of(user or ""), []
    if owner or p.config.adapters == "shared":
        steps = turns.steps(Path(p.config.out) / "metrics.jsonl", admin, owner)
    return {"pleased": turns.pleased(db, user), "steps": steps}


def file(media_type: str, *names: str) -> Response:
    return Response(b"\n".join((HERE / name).read_bytes() for name in names), media_type=media_type, headers=HEADERS)


def answer(found: Any) -> Response:
    """JSON in ASCII: a text that a client cut may end in half a surrogate pair, which UTF-8 can't encode."""
    return Response(json.dumps(found), media_type="application/json", headers=NOT_KEPT)


def is_admin(request: Request) -> bool:
    return sees_all(request.state.user)


def whose(request: Request) -> str | None:
    """The user whose turns a request may see: the one whose key it has, or for the admin the one in the query; None:
    everybody's."""
    return request.query_params.get("user") or None if is_admin(request) else request.state.user.name


def wanted(request: Request) -> dict[str, Any]:
    """Which turns are to be listed. ValueError if the query is invalid."""
    asked = request.query_params
    if (state := asked.get("state") or None) not in (None, *look.STATES):
        raise ValueError(f"state: expected one of {', '.join(look.STATES)}")
    where = {"user": whose(request), "session": asked.get("session") or None, "state": state}
    return where | {"before": float(asked.get("before") or 0)}


def routes(p: Program) -> list[Route]:
    path = Path(p.config.out) / "journal.db"
    reading = ThreadPoolExecutor(1, "page")  # one thread, so that open pages never take more than that from serving

    async def in_thread(read: Callable, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with closing(turns.connect(path)) as db:
                db.execute("BEGIN")  # one view of all tables: `forget` may run at the same time
                return read(db, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(reading, run)

    async def events(request: Request) -> Response:
        """All that the page shows, as soon as there is something new; the curves at most every REDRAWN seconds."""
        try:
            where = wanted(request)
        except ValueError as e:
            return openai_error(400, str(e))
        user, admin = where["user"], is_admin(request)

        async def stream() -> AsyncIterator[str]:
            last, silent, redraw_at, drawn = None, 0, 0.0, None
            # A stream ends when its key is revoked, or when the first key is added.
            while not p.state.stopping.is_set() and p.keys.user_of(request.headers) == request.state.user:
                training = training_of(p, user) | {"version": p.db.total_changes, "admin": admin}
                now = await in_thread(glance, p, user, training)
                redraw = now != drawn and time.monotonic() >= redraw_at
                silent = silent + 1 if now == last else 0
                if now != last or redraw:
                    event = now | {"listed": await in_thread(turns.listed, **where)}
                    if redraw:
                        event["curves"] = await in_thread(curves, p, user, admin)
                        redraw_at, drawn = time.monotonic() + REDRAWN, now
                    yield f"data: {json.dumps(event)}\n\n"
                elif silent % 15 == 0:  # a client that hung up is noticed by this
                    yield ": nothing new\n\n"
                last = now
                await asyncio.sleep(EVERY)

        return StreamingResponse(stream(), media_type="text/event-stream", headers=NOT_KEPT)

    async def listed(request: Request) -> Response:
        try:
            return answer(await in_thread(turns.listed, **wanted(request)))
        except ValueError as e:
            return openai_error(400, str(e))

    async def tokens(request: Request) -> Response:
        number = request.path_params["number"]
        found = await in_thread(turns.tokens, p.state.tokenizer, number, whose(request))
        return answer(found) if found else openai_error(404, f"you have no turn {number}")

    async def leave_out(request: Request) -> Response:
        try:
            session = str((await asyncio.to_thread(parse, await request.body()))["session"])
            session.encode()  # SQLite can't take half a surrogate pair
        except (ValueError, KeyError, TypeError) as e:
            return openai_error(400, f'expected {{"session": ...}}: {e!r}')
        count = await p.write(journal.leave_out, session, whose(request))
        return answer({"done": f"{count} answers of this conversation will not be trained on"})

    return [
        *[Route(at, lambda _, parts=parts: file(*parts)) for at, parts in FILES.items()],
        Route("/web/events", events),
        Route("/web/turns", listed),
        Route("/web/turns/{number}", tokens),
        Route("/web/leave_out", leave_out, methods=["POST"]),
        *learned_routes(p, in_thread),
    ]


def learned_routes(p: Program, in_thread: Callable) -> list[Route]:
    one_at_a_time = asyncio.Lock()
    asking = Counter[str]()  # by user: how many run or wait; each takes the judge's thread for seconds

    async def rules(request: Request) -> Response:
        return answer(await in_thread(look.rules, whose(request)))

    async def ask_again(request: Request) -> Response:
        number, user = request.path_params["number"], request.state.user.name
        if asking[user] >= MAX_ASKING:
            return openai_error(429, f"{MAX_ASKING} of your requests are being asked again: wait for one of them")
        asking[user] += 1
        try:
            async with one_at_a_time:
                found = await in_thread(learned.complaint_about, number, whose(request))
                if found is None:
                    return openai_error(404, f"you have no turn {number} with a complaint")
                return answer(await learned.ask_again(p, *found))
        except (KeyError, ValueError) as e:
            return openai_error(400, f"it can't be asked again: {e}")
        finally:
            asking[user] -= 1

    return [Route("/web/learned", rules), Route("/web/learned/{number}", ask_again)]
