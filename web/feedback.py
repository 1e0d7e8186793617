"""`POST /v1/feedback`: a user rates an answer. `GET /status`: how many turns are in which state."""

import asyncio
import sqlite3
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import reward
from clients.bodies import openai_error, parse, too_much
from clients.keys import sees_all
from clients.sessions import find_rated, request_of
from durable import journal
from durable.journal import Verdict
from program import Program

WORDS_S = 30.0  # Open WebUI sends a thumb at the click, and its words once the person has filled in a form
MAX_RATING_BYTES = 4 << 20  # the event loop compares the messages, for up to 0.5 s
UNUSED = (  # words with a bad rating
    f"Noted as bad. The words can't be a hint: a hint has {reward.MIN_HINT} to {reward.MAX_HINT} characters, gives no "
    "orders to a judge, and doesn't contradict the request."
)
MAX_TEXT = 10_000  # characters of a rating's text; it is on the page


def training_of(p: Program, user: str | None) -> dict[str, Any]:
    """The training state of the weights that answer this user; None: of everybody's."""
    steps = {p.owner_of(user): p.steps().get(p.owner_of(user), 0)} if user else p.steps()
    paused = {owner: why for owner, why in p.paused.items() if owner}
    return {
        "step": sum(steps.values()),
        **({"steps": steps, "paused": paused} if p.config.adapters == "user" and not user else {}),
        "training": p.paused.get("") or paused.get(user, "on"),
        "batch_size": p.config.batch_size,
        "pause": p.pause,
    }


def together(db: sqlite3.Connection, p: Program, user: str | None) -> int:
    """The largest number of queued turns that can be in one batch, which changes the weights of one owner."""
    if user is not None or p.config.adapters == "shared":
        return journal.counts(db, user).get("queued", 0)
    queued = db.execute("SELECT user, n FROM counters WHERE state = 'queued'").fetchall()
    return max((r["n"] for r in queued if r["user"] not in p.paused), default=0)


def routes(p: Program) -> list[Route]:
    async def feedback(request: Request) -> JSONResponse:
        rater = request.state.user
        user = rater.name or "admin"
        try:
            sent = await request.body()
            if len(sent) > MAX_RATING_BYTES:
                return openai_error(413, f"over {MAX_RATING_BYTES >> 20} MiB: send completion_id instead of messages")
            body = await asyncio.to_thread(parse, sent)
            score, text, messages = body["score"], body.get("text", ""), [dict(m) for m in body.get("messages", [])]
            if why := too_much(body, messages, len(sent)):
                return openai_error(400, why)
            said = [{"role": "user", "content": text}]
            turn_id = find_rated(p.db, user, messages) if messages else body["completion_id"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            which = '"completion_id": ... or "messages": [..., the rated answer]'
            return openai_error(400, f'expected {{{which}, "score": 1 or -1, "text": optional}}: {e!r}')
        if type(score) is not int or score not in (1, -1) or not isinstance(text, str) or len(text) > MAX_TEXT:
            return openai_error(400, f"score must be 1 or -1, and text a string of at most {MAX_TEXT} characters")
        try:
            turn, _ = journal.load_turn(p.db, str(turn_id))
        except (KeyError, UnicodeEncodeError):  # SQLite can't take half a surrogate pair
            turn = None
        if turn is None or turn.user != user and not sees_all(rater):
            not_given = "the last of these messages is not an answer that you were given"
            return openai_error(404, not_given if messages else f"you have no completion {turn_id!r}")
        hints = reward.own_words(request_of(turn.messages), said) if score < 0 else []
        verdict = Verdict(score, [score], 1.0, hints, "own words" if hints else "", user, "feedback")
        try:
            state = await p.write(journal.record_verdict, turn.id, verdict)
        except ValueError as e:
            late = {"score": score, "text": text, "time": time.time()}
            await p.write(journal.keep_late_feedback, turn.id, late)
            return openai_error(409, f"kept, but not trained on: {e}")
        p.judged_at[turn.id] = asyncio.get_running_loop().time() + (WORDS_S if messages and not text else 0)
        if state == "queued" and await p.admit(turn.id, turn.user):
            p.wake.set()
        unused = {"done": UNUSED} if score < 0 and text.strip() and not hints else {}
        return JSONResponse({"completion_id": turn.id, "score": score} | unused)

    async def status(request: Request) -> JSONResponse:
        asking = request.state.user
        user = None if sees_all(asking) else asking.name
        turns = {"turns": journal.counts(p.db, user), "dropped": journal.drop_reasons(p.db, user)}
        batch = {"batch": f"{together(p.db, p, user)} of {p.config.batch_size}"}  # what a step waits for
        return JSONResponse(training_of(p, user) | batch | turns)

    return [Route("/v1/feedback", feedback, methods=["POST"]), Route("/status", status, methods=["GET"])]
