"""The API: vLLM's own OpenAI app, mounted behind a capture that writes every answer into the journal.

`Capture` (ASGI) checks the key and reads the body of a POST. `Recorder` takes the engine's place in vLLM's app: it
passes every output through unchanged, and writes the turn down before its last token is sent.
"""

import asyncio
import hmac
import json
import re
import resource
import sqlite3
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import uvicorn
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import reward
import swap
from clients import connections
from clients.answers import AnswerReader
from clients.bodies import LONG_BODY, openai_error, parse, read_body, too_much, with_reasoning_content
from clients.keys import ADMIN, Keys, User, why_not_keyless
from clients.sessions import answer_digest, asked_by_the_client, find_rated, find_turns, is_news, keys_of, request_of
from durable import journal
from durable.journal import Turn, Verdict

CHAT = "/v1/chat/completions"
CAPTURED = (CHAT, "/v1/messages", "/v1/responses")
OPEN_PATHS = ("/health", "/", "/web/page.js", "/web/page.css", "/web/uPlot.js", "/web/uPlot.css")  # they hold no data
SESSION_HEADERS = ("x-session-id", "x-session-affinity", "x-openwebui-chat-id")
# The other fields of a chat request that go into the prompt; vLLM's /tokenize has the same names for them.
TEMPLATE_FIELDS = ("tools", "chat_template", "add_generation_prompt", "continue_final_message")

SAMPLING_DEFAULTS = {
    "top_p": 1.0,
    "top_k": 0,  # and -1: both mean "off" in vLLM
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "structured_outputs": None,
    "min_tokens": 0,
    "thinking_token_budget": None,
}
MIN_TEMPERATURE = 0.3  # below it log-probs are so steep that rounding alone moves them by more than PPO's clip range


# ---- capture ----


@dataclass
class Asked:
    """What the HTTP side knows of the request that the engine is about to answer."""

    user: str
    untrained: bool  # this key's answers are not trained on
    path: str
    messages: list[dict]  # for other APIs than chat: those that vLLM converts the request into, see note_rendered
    template: dict  # the TEMPLATE_FIELDS that are there
    session: str | None  # user/ID, where a client names one
    side: bool  # X-Turn-Type: side
    done: bool  # X-Session-Done: no next message will come
    turn_id: str = ""  # once the engine has the request
    answers: dict[int, str] = field(default_factory=dict)  # choice -> digest of the recorded text


asked: ContextVar[Asked | None] = ContextVar("asked", default=None)
caller: ContextVar[str] = ContextVar("caller", default="")  # the user's name, of any request
OURS = User("")  # the program itself and the admin: not recorded
ANYBODY = User("local")  # where no key is needed


def sees_all(user: User) -> bool:
    return user is OURS or user is ANYBODY  # not by its name: a key's user may have the same


class Capture:
    """ASGI: check the key, read the body, remember who asks what, replay the body to vLLM's app."""

    def __init__(self, app: ASGIApp, hooks: "Hooks", db: sqlite3.Connection) -> None:
        self.app, self.db, self.keys, self.own_key = app, db, hooks.keys, hooks.own_key
        self.origins = hooks.origins

    def user_of(self, headers: Headers) -> User | None:
        """Whose key this is; None for a wrong one."""
        users = self.keys.users()
        bearer = re.sub(r"(?i)^bearer\s+", "", headers.get("authorization", "")).strip()
        given = [bearer.encode(), headers.get("x-api-key", "").encode()]
        known = {self.own_key: OURS, self.keys.admin: OURS, **(users or {})}
        found = [user for key, user in known.items() for g in given if hmac.compare_digest(key.encode(), g)]
        return found[0] if found else ANYBODY if users is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a websocket: what is said over vLLM's realtime endpoint would not be recorded
            return await send({"type": f"{scope['type']}.close", "code": 1008})
        headers = Headers(scope=scope)
        user = OURS if scope["path"] in OPEN_PATHS else self.user_of(headers)
        if refused := self.why_refused(scope, headers, user):
            return await refused(scope, receive, send)
        scope.setdefault("state", {})["user"] = user
        caller.set(user.name)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = await read_body(receive)
        if not isinstance(body, bytes):
            return await body(scope, receive, send) if body else None
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()  # vLLM waits here for http.disconnect
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        # vLLM makes its request id, and so the id of our row, from this header: a client's own could come twice.
        MutableHeaders(scope=scope)["x-request-id"] = uuid.uuid4().hex
        asked.set(None)
        if user is not OURS and scope["path"] in CAPTURED:
            try:
                body_json = await asyncio.to_thread(parse, body) if len(body) > LONG_BODY else parse(body)
            except (ValueError, RecursionError) as e:
                error = openai_error(400, f"the body is not JSON that can be served: {e}")
                return await error(scope, replay, send)
            # Bodies that aren't objects, or have no list of messages, get a 400 from vLLM's app. Beam search asks the
            # engine for many answers of one token, none of them what the client gets.
            fields = body_json if isinstance(body_json, dict) and not body_json.get("use_beam_search") else {}
            messages, chat = fields.get("messages", fields.get("input")), scope["path"] == CHAT
            if why := too_much(fields, messages, len(body)):
                return await openai_error(400, why)(scope, replay, send)
            if scope["path"] == "/v1/responses" and fields:  # the one API that takes its id from the body
                body = json.dumps(fields | {"request_id": f"resp_{uuid.uuid4().hex}"}).encode()
            if fields and (not chat or isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
                named = next((v for v in map(headers.get, SESSION_HEADERS) if v), None)
                template = {k: fields[k] for k in TEMPLATE_FIELDS if k in fields}
                asked.set(
                    Asked(
                        user=user.name,
                        untrained=not user.trained,
                        path=scope["path"],
                        messages=messages if chat else [],
                        template=template if chat else {},
                        session=f"{user.name}/{named}" if named else None,
                        side=headers.get("x-turn-type", "").lower() == "side",
                        done=headers.get("x-session-done", "").lower() in ("1", "true"),
                    )
                )
                send = self.noting_answers(send, asked.get())
        await self.app(scope, replay, with_reasoning_content(send) if scope["path"] == CHAT else send)

    def why_refused(self, scope: Scope, headers: Headers, user: User | None) -> JSONResponse | None:
        """The answer to a request that is not served, by its head alone."""
        path = scope["path"]
        if user is None:
            return openai_error(401, "wrong or missing API key")
        if user is ANYBODY and (why := why_not_keyless(headers, self.origins)):
            return openai_error(403, f"{why}: a key is needed for that, put one into {self.keys.file}")
        if not sees_all(user) and path.startswith("/metrics"):
            return openai_error(403, f"everybody's figures need the key in {self.keys.file.with_name(ADMIN)}")
        written = path == "/v1/feedback" or user is not OURS and path in CAPTURED
        if scope["method"] == "POST" and written and not journal.has_disk_space(self.db):
            return openai_error(507, "the disk is full: nothing more can be written down", "server_error")
        return None

    def noting_answers(self, send: Send, request: Asked) -> Send:
        """Before the end of an answer is sent, its turn gets the digest of what the client was sent."""
        reader: AnswerReader | None = None  # none for an error

        async def noted(message: Message) -> None:
            nonlocal reader
            if message["type"] == "http.response.start" and message["status"] == 200:
                kind = Headers(raw=message["headers"]).get("content-type", "")
                reader = AnswerReader(streamed=kind.startswith("text/event-stream"))
            elif reader and request.turn_id:
                answers = reader.feed(message.get("body", b""), message.get("more_body", False))
                for index, answer in answers.items():
                    digest = answer_digest(answer)
                    if digest != request.answers.get(index, digest):
                        turn_id = choice_id(request.turn_id, index)
                        await journal.patiently(journal.record_answer, self.db, turn_id, digest)
            await send(message)

        return noted


def choice_id(turn_id: str, index: int) -> str:
    return turn_id if index == 0 else f"{turn_id}/{index}"


def note_rendered(renderer: Any) -> None:
    """Have requests to /v1/messages and /v1/responses noted as the chat messages that vLLM makes of them, and of all
    requests what else goes into the chat template (reasoning_effort, thinking).

    Relied on in vLLM 0.32.0: they come to OnlineRenderer.preprocess_chat (a model of OpenAI's own format has another
    way, and those are not recorded); a request may have another one rendered before, as a probe. `build_chat_params`
    makes the template's arguments from a request's fields.
    """
    render = renderer.preprocess_chat

    async def preprocess_chat(request: Any, messages: list, *args: Any, **kwargs: Any) -> Any:
        if (seen := asked.get()) is None:
            return await render(request, messages, *args, **kwargs)
        made = request.build_chat_params(None, "auto").chat_template_kwargs
        # The two that every request has are fields of /tokenize, too, and may not be given twice.
        known = ("add_generation_prompt", "continue_final_message", "tools", "tokenize")
        arguments = {k: v for k, v in made.items() if v is not None and k not in known}
        seen.template = {k: v for k, v in seen.template.items() if k != "chat_template_kwargs"}
        seen.template |= {"chat_template_kwargs": arguments} if arguments else {}
        if seen.path != CHAT:
            # As plain JSON, and a copy of its own: vLLM rewrites calls in place, and pydantic's iterators end.
            text = json.dumps(messages, default=lambda o: o.model_dump() if hasattr(o, "model_dump") else list(o))
            messages, seen.messages = json.loads(text), json.loads(text)
            for part in (p for m in seen.messages if isinstance(m.get("content"), list) for p in m["content"]):
                if part.get("type") in ("input_text", "output_text"):
                    part["type"] = "text"  # /tokenize, for the hinted prompt, knows it by this name
            if tools := kwargs.get("tool_dicts"):
                seen.template["tools"] = tools
        # A client's max_tokens may be over the context, and its user can't change it (Claude Code asks for 32,000).
        # vLLM would refuse it while rendering, and takes what fits when it samples.
        limits = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        given = {k: v for k in limits if (v := getattr(request, k, None)) and v > 0}
        for name in given:
            setattr(request, name, None)
        try:
            return await render(request, messages, *args, **kwargs)
        finally:
            for name, value in given.items():
                setattr(request, name, value)

    renderer.preprocess_chat = preprocess_chat


def why_no_rl(params: Any) -> str:
    """Why an answer sampled with these vLLM SamplingParams is no sample of the plain policy; "" where it is one."""
    if params.temperature < MIN_TEMPERATURE:
        return f"temperature {params.temperature:g} is below {MIN_TEMPERATURE}"
    changed = [k for k, v in SAMPLING_DEFAULTS.items() if (getattr(params, k) or v) != v]
    if "top_k" in changed and params.top_k == -1:
        changed.remove("top_k")
    return f"sampled with {', '.join(changed)}" if changed else ""


Changed = list[tuple[Callable[[str], Awaitable], str]]  # hooks, and the turn that each is to hear of


class Recorder:
    """The engine, as vLLM's app sees it: `generate` also records the turn; everything else is passed on."""

    def __init__(self, engine: Any, db: sqlite3.Connection, hooks: "Hooks") -> None:
        self._engine, self._db, self._hooks = engine, db, hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        request = asked.get()
        if request is not None and request.path != CHAT and not request.messages:
            request = None  # see note_rendered
        sampling_params.seed = swap.usable_seed(self._engine, sampling_params.seed)
        if request is None:
            await self._hooks.bring(caller.get())
            async with self.start(prompt, sampling_params, request_id, *args, **kwargs) as outputs:
                async for output in outputs:
                    yield output
            return

        # The prompt was valid, or we would not be here: only now does the request count as a next message.
        session, dropped, changed = await journal.patiently(self.link, self._db, request)
        if kwargs.get("lora_request"):
            dropped = "answered by the first weights"
        for hook, earlier in changed:
            await hook(earlier)
        # As the client knows it: /v1/responses numbers the calls to the engine.
        request.turn_id = turn_id = request_id.removesuffix("_0") if request.path == "/v1/responses" else request_id
        if sampling_params.logprobs is None:
            sampling_params.logprobs = 0  # the sampled token's own; the client's answer doesn't show it
        keys = keys_of(request.messages)
        delta = sampling_params.output_kind.name == "DELTA"
        seen: dict[int, tuple[list[int], list[float], list[str]]] = {}  # by choice index, for n > 1
        prompt_ids: list[int] = []
        written: set[int] = set()

        async def write(index: int, finish_reason: str | None, spans: list, why_not: str | None) -> None:
            ids, logprobs, texts = seen[index]
            if finish_reason not in ("stop", "length"):  # "abort" is what a stopping engine gives
                why_not = "cut short: the client hung up, or the engine stopped"
            elif (served := self.served_step()) is not None and any(version > served for version, _, _ in spans):
                why_not = "by weights that were undone"
            text = "".join(texts)
            request.answers[index] = answer_digest({"role": "assistant", "content": text})
            turn = Turn(
                id=choice_id(turn_id, index),
                session=session,
                user=request.user,
                messages=request.messages,
                template=request.template,
                answer=request.answers[index],
                **keys,
                text=text,
                finish_reason=finish_reason,
                prompt_ids=prompt_ids,
                response_ids=ids,
                logprobs=logprobs,
                versions=spans,
                temperature=sampling_params.temperature,
                no_rl=why_no_rl(sampling_params),
            )
            await journal.patiently(journal.record_turn, self._db, turn, why_not)
            written.add(index)

        await self._hooks.bring(caller.get())
        try:
            async with self.start(prompt, sampling_params, request_id, *args, **kwargs) as outputs:
                async for output in outputs:
                    prompt_ids = output.prompt_token_ids or prompt_ids
                    for choice in output.outputs:
                        ids, logprobs, texts = seen.setdefault(choice.index, ([], [], []))
                        if not delta:
                            ids.clear(), logprobs.clear(), texts.clear()
                        ids += choice.token_ids
                        pairs = zip(choice.logprobs or [], choice.token_ids, strict=True)
                        logprobs += [at[i].logprob for at, i in pairs]
                        texts.append(choice.text)
                        if choice.finish_reason is not None and choice.index not in written:
                            spans = [(int(s.version), s.start, s.end) for s in choice.weight_versions or []]
                            await write(choice.index, choice.finish_reason, spans, dropped)
                    yield output
        finally:
            # Cut short: the client hung up, or the engine failed. What there is stays readable, never trained on.
            for index, (ids, _, _) in seen.items():
                if index not in written:
                    await write(index, None, [(-1, 0, len(ids))], None)

    def start(self, prompt: Any, *args: Any, **kwargs: Any) -> aclosing:
        """The engine's outputs, by the weights that answer the caller. The prompt is salted last, when it is known
        which ones. aclosing: when the client hangs up, the engine must hear of it at once, not when the inner generator
        is collected."""
        owner, prompt = self._hooks.owner_of(caller.get()), swap.salted(prompt, caller.get())
        return aclosing(swap.generate(self._engine, owner, prompt, *args, **kwargs))

    def served_step(self) -> int | None:
        return swap.served_step(self._engine, self._hooks.owner_of(caller.get()))

    def link(self, db: sqlite3.Connection, request: Asked) -> tuple[str, str | None, Changed]:
        """Find the turn that this request continues and record it as that turn's next message.

        So is the message before the last answer, for the turn before: what came next may have been a client's own
        request, and only this history shows what stayed in the conversation. Returns the new turn's session, why
        the new turn is not trained on, if that is known already, and which hooks are to hear of which turns."""
        side = request.side or asked_by_the_client(request.messages)
        changed: Changed = []
        found = find_turns(db, request.user, request.messages, request.session)
        for k, (turn, following) in enumerate([] if request.untrained else found):
            kept = k > 0
            if not following or (side and not kept):
                continue
            confirmed = kept or request.done
            if is_news(turn, following, kept):
                if journal.record_next(db, turn["id"], following, confirmed):
                    changed.append((self._hooks.on_next, turn["id"]))
            elif confirmed and not turn["confirmed"]:
                journal.confirm(db, turn["id"])
                changed.append((self._hooks.on_confirmed, turn["id"]))
        session = request.session or (found[0][0]["session"] if found else uuid.uuid4().hex[:12])
        why_not = journal.UNTRAINED if request.untrained else journal.LAST if request.done else None
        if side and not request.untrained:
            why_not = "side request" + (", by its header" if request.side else ": the client's own, not a person's")
        return session, why_not, changed


# ---- the app ----


class WebServer(uvicorn.Server):
    """uvicorn without its signal handlers: run.py decides when things stop, and in which order."""

    def capture_signals(self) -> AbstractContextManager:
        return nullcontext()


def web_server(app: ASGIApp, certificate: str = "", key: str = "") -> WebServer:
    """Streams that still run get 3 s to end when the server stops. Idle connections stay open for longer than clients
    keep them, otherwise one could be closed while a request is on its way. No warnings in the log: anybody could fill
    it with "Invalid HTTP request received". The backlog is how many connections asyncio accepts at a time, and how many
    tracebacks it logs each second when there are no file descriptors; `connections.Listener` has the socket's own."""
    from vllm.utils.system_utils import set_ulimit

    set_ulimit(min(65535, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))  # it does nothing where it can't have all
    options = {"timeout_graceful_shutdown": 3, "timeout_keep_alive": 75, "lifespan": "off", "ws": "none", "backlog": 1}
    options |= {"ssl_certfile": certificate or None, "ssl_keyfile": key or None}
    return WebServer(uvicorn.Config(app, http=connections.Protocol, log_level="error", **options))


class Hooks(Protocol):
    """What the app asks and tells the program that it is a part of."""

    keys: Keys
    own_key: str  # of the program's own requests
    origins: list[str]  # of web pages that may call from a browser

    def owner_of(self, user: str) -> str:
        """Whose weights answer this user."""

    async def bring(self, user: str) -> None:
        """Have the weights that answer this user in the engine."""

    async def on_next(self, turn_id: str) -> None:
        """A conversation continued from this turn: it is to be judged."""

    async def on_confirmed(self, turn_id: str) -> None:
        """The turn's next message is final now."""

    async def on_feedback(self, turn_id: str, verdict: Verdict) -> None:
        """A user rated this turn. ValueError where that comes too late."""

    def status(self, user: str | None) -> dict[str, Any]:
        """The body of GET /status, for one user or with everybody's figures."""


def engine_figures() -> bytes:
    """vLLM's own Prometheus figures, as its /metrics has them (it makes the registry anew each time)."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return generate_latest(get_prometheus_registry())


async def build_app(
    engine: Any, args: Namespace, db: sqlite3.Connection, hooks: Hooks, more: Sequence[Route] = ()
) -> ASGIApp:
    """vLLM's OpenAI app behind the capture, next to `POST /v1/feedback`, `GET /status` and `more` routes.

    Relied on in vLLM 0.32.0: `build_app` and `init_app_state` as its own launcher calls them, and that the app
    reaches the engine through the object given to `init_app_state` alone.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app

    tasks = await engine.get_supported_tasks()
    vllm_app = build_vllm_app(args, tasks, engine.model_config)
    await init_app_state(Recorder(engine, db, hooks), vllm_app.state, args, tasks)
    note_rendered(vllm_app.state.online_renderer)
    if args.enable_lora:
        first = swap.first_weights_request(args.served_model_name[0])
        vllm_app.state.openai_serving_models.lora_requests[first.lora_name] = first
    vllm_app.state.server = SimpleNamespace()  # vLLM tells it to exit when the engine died; here swap.watch does that

    async def feedback(request: Request) -> JSONResponse:
        rater = request.scope["state"]["user"]
        user = rater.name or "admin"
        try:
            body = json.loads(await request.body())
            score, text, messages = body["score"], body.get("text", ""), [dict(m) for m in body.get("messages", [])]
            said = [{"role": "user", "content": text}]
            turn_id = find_rated(db, user, messages, said) if messages else body["completion_id"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            which = '"completion_id": ... or "messages": [..., the rated answer]'
            return openai_error(400, f'expected {{{which}, "score": 1 or -1, "text": optional}}')
        if score not in (1, -1) or isinstance(score, bool) or not isinstance(text, str):
            return openai_error(400, "score must be 1 or -1, and text a string")
        try:
            turn, _ = journal.load_turn(db, str(turn_id))
        except KeyError:
            turn = None
        if turn is None or turn.user != user and not sees_all(rater):
            which = "answer at the end of these messages that is" if messages else f"completion {turn_id!r}"
            return openai_error(404, f"no {which} of yours")
        try:
            hints = reward.own_words(request_of(turn.messages), said) if score < 0 else []
            await hooks.on_feedback(
                turn.id, Verdict(score, [score], 1.0, hints, "own words" if hints else "", user, "feedback")
            )
        except ValueError as e:
            late = {"score": score, "text": text, "time": time.time()}
            await journal.patiently(journal.keep_late_feedback, db, turn.id, late)
            return openai_error(409, f"too late to train on, but kept: {e}")
        return JSONResponse({"completion_id": turn.id, "score": score})

    async def show_status(request: Request) -> JSONResponse:
        user = request.scope["state"]["user"]
        return JSONResponse(hooks.status(None if sees_all(user) else user.name))

    routes = [
        Route("/v1/feedback", feedback, methods=["POST"]),
        Route("/status", show_status, methods=["GET"]),
        *more,
        Mount("/", app=vllm_app),
    ]
    capture = Capture(Starlette(routes=routes), hooks, db)
    # Outside the capture: a browser asks first, without a key, and must be able to read a 401, too.
    return CORSMiddleware(capture, allow_origins=hooks.origins, allow_methods=["*"], allow_headers=["*"])
