"""The API: vLLM's own OpenAI app behind ASGI middleware that records every answer in the journal.

`Capture` (ASGI) checks the key and reads the body of a POST. `Recorder` replaces the engine in vLLM's app: it passes on
every output, and records the turn before its last token is sent.
"""

import asyncio
import json
import sqlite3
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import swap
from clients.answers import AnswerReader
from clients.bodies import LONG_BODY, openai_error, parse, read_body, too_much, with_reasoning_content
from clients.keys import ADMIN, ANYBODY, OURS, User, sees_all, why_not_keyless
from clients.quirks import named_session
from clients.sessions import answer_digest, asked_by_the_client, find_turns, keys_of, record_following, unfinished
from durable import journal
from durable.journal import Turn
from program import Program

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
CAPTURED = (CHAT, "/v1/messages", RESPONSES)
OPEN_PATHS = ("/health", "/", "/web/page.js", "/web/page.css")  # they hold no data
# Fields of a chat request, besides its messages, that change the prompt. vLLM's /tokenize has the same ones.
TEMPLATE_FIELDS = ("tools", "chat_template", "add_generation_prompt", "continue_final_message")

# Sampling parameters that change the distribution: with one of them set, an answer is off-policy.
OFF_POLICY = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
OFF_POLICY += ("allowed_token_ids", "bad_words", "structured_outputs", "min_tokens", "thinking_token_budget")
MIN_TEMPERATURE = 0.3  # below it, rounding alone changes log-probs by more than PPO's clip range


# ---- capture ----


@dataclass
class Asked:
    """What the HTTP side knows about the request that the engine is about to answer."""

    user: User  # whose key came with it
    path: str
    messages: list[dict]  # for other APIs than chat: the chat messages that vLLM makes, see `note_rendered`
    template: dict  # the TEMPLATE_FIELDS that it has
    session: str | None  # user/ID, if the client names one
    side: bool  # X-Turn-Type: side
    done: bool  # X-Session-Done: no next message will come
    echo: bool  # vLLM's option to send the text that the answer continues once more, at the answer's beginning
    turn_id: str = ""  # set when the engine gets the request
    answers: dict[int, str] = field(default_factory=dict)  # choice -> digest of the recorded text

    def digest_of(self, answer: dict, sent: bool = False) -> str:
        """The digest by which this answer to the request is found again. `sent`: as the client gets it."""
        before = unfinished(self.messages)
        return answer_digest(*(before[:-1] if sent and self.echo else before), answer)


asked: ContextVar[Asked | None] = ContextVar("asked", default=None)
caller: ContextVar[str] = ContextVar("caller", default="")  # name of the user whose request is being handled


class Capture:
    """ASGI: check the key, read the body, note who asks what, and replay the body to vLLM's app."""

    def __init__(self, app: ASGIApp, p: Program) -> None:
        self.app, self.db, self.keys, self.origins = app, p.db, p.keys, p.config.web_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a websocket: vLLM's realtime endpoint would not be recorded
            return await send({"type": f"{scope['type']}.close", "code": 1008})
        headers = Headers(scope=scope)
        is_open = scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD")
        user = OURS if is_open else self.keys.user_of(headers)
        if refused := self.why_refused(scope, headers, user):
            return await refused(scope, receive, send)
        scope.setdefault("state", {})["user"] = user
        caller.set(user.name)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = await read_body(receive)
        if not isinstance(body, bytes):
            return await body(scope, receive, send) if body else None
        # vLLM makes its request id, which is also the turn's id, from this header. A client's own might not be unique.
        MutableHeaders(scope=scope)["x-request-id"] = uuid.uuid4().hex
        asked.set(None)
        if user is not OURS and scope["path"] in CAPTURED:
            try:
                body_json = await asyncio.to_thread(parse, body) if len(body) > LONG_BODY else parse(body)
            except (ValueError, RecursionError) as e:
                why = f"the body is not JSON that can be served: {e}"
                return await openai_error(400, why)(scope, receive, send)
            # A body that isn't an object, or has no list of messages, gets a 400 from vLLM's app. Beam search is not
            # recorded: it asks the engine for many answers of one token, and none is what the client gets.
            fields = body_json if isinstance(body_json, dict) and not body_json.get("use_beam_search") else {}
            messages, chat = fields.get("input" if scope["path"] == RESPONSES else "messages"), scope["path"] == CHAT
            if fields.get("kv_transfer_params"):  # it could hold the token ids of another prompt
                why = "kv_transfer_params is not supported: a prompt is made from its messages"
                return await openai_error(400, why)(scope, receive, send)
            if why := too_much(fields, messages, len(body)):
                return await openai_error(400, why)(scope, receive, send)
            if scope["path"] == RESPONSES and fields:  # this API takes its id from the body
                body = json.dumps(fields | {"request_id": f"resp_{uuid.uuid4().hex}"}).encode()
            if fields and (not chat or isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
                named = named_session(headers)
                request = Asked(
                    user=user,
                    path=scope["path"],
                    messages=messages if chat else [],
                    template={k: fields[k] for k in TEMPLATE_FIELDS if chat and k in fields},
                    session=f"{user.name}/{named}" if named else None,
                    side=headers.get("x-turn-type", "").lower() == "side",
                    done=headers.get("x-session-done", "").lower() in ("1", "true"),
                    echo=chat and fields.get("echo") is True,
                )
                asked.set(request)
                send = self.noting_answers(send, request)
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()  # vLLM waits there for http.disconnect

        await self.app(scope, replay, with_reasoning_content(send) if scope["path"] == CHAT else send)

    def why_refused(self, scope: Scope, headers: Headers, user: User | None) -> JSONResponse | None:
        """The error for a request that is refused because of its path and headers; None if it isn't."""
        path = scope["path"]
        if user is None:
            return openai_error(401, "wrong or missing API key")
        if user is ANYBODY and (why := why_not_keyless(headers, self.origins)):
            return openai_error(403, f"{why}. Such a request needs a key: add one to {self.keys.file}")
        if not sees_all(user) and path.startswith("/metrics"):
            return openai_error(
                403, f"/metrics covers all users: it needs the key in {self.keys.file.with_name(ADMIN)}"
            )
        written = path == "/v1/feedback" or user is not OURS and path in CAPTURED
        if scope["method"] == "POST" and written and not journal.has_disk_space(self.db):
            return openai_error(507, "the disk is full: nothing more can be recorded", "server_error")
        return None

    def noting_answers(self, send: Send, request: Asked) -> Send:
        """Wrap `send`: before the last chunk goes out, record the digest of the answer that the client gets."""
        reader: AnswerReader | None = None  # none for an error

        async def noted(message: Message) -> None:
            nonlocal reader
            if message["type"] == "http.response.start" and message["status"] == 200:
                kind = Headers(raw=message["headers"]).get("content-type", "")
                reader = AnswerReader(streamed=kind.startswith("text/event-stream"))
            elif reader and request.turn_id:
                for index, answer in reader.feed(message.get("body", b""), message.get("more_body", False)).items():
                    turn_id, digest = choice_id(request.turn_id, index), request.digest_of(answer, sent=True)
                    if digest != request.answers.get(index, digest):
                        await journal.patiently(journal.record_answer, self.db, turn_id, digest)
            await send(message)

        return noted


def choice_id(turn_id: str, index: int) -> str:
    return turn_id if index == 0 else f"{turn_id}/{index}"


def note_rendered(renderer: Any) -> None:
    """Note the chat messages that vLLM makes of requests to /v1/messages and /v1/responses, and for every request the
    other arguments of the chat template (reasoning_effort, thinking). Also hide max_tokens from vLLM's check.

    Relied on in vLLM 0.32.0: the requests of all three APIs go through OnlineRenderer.preprocess_chat. (A gpt-oss
    model's do not, so of its answers only chat completions are recorded.) vLLM may render a request an extra time
    first, as a probe. `build_chat_params` makes the template's arguments from a request's fields.
    """
    render = renderer.preprocess_chat

    async def preprocess_chat(request: Any, messages: list, *args: Any, **kwargs: Any) -> Any:
        if (seen := asked.get()) is None:
            return await render(request, messages, *args, **kwargs)
        made = request.build_chat_params(None, "auto").chat_template_kwargs
        # /tokenize has these fields itself. If they were also among the template's arguments, it would get them twice.
        known = ("add_generation_prompt", "continue_final_message", "tools", "tokenize")
        arguments = {k: v for k, v in made.items() if v is not None and k not in known}
        seen.template = {k: v for k, v in seen.template.items() if k != "chat_template_kwargs"}
        seen.template |= {"chat_template_kwargs": arguments} if arguments else {}
        if seen.path != CHAT:
            # Two copies as plain JSON: vLLM changes calls in place, and pydantic's iterators can be read only once.
            text = json.dumps(messages, default=lambda o: o.model_dump() if hasattr(o, "model_dump") else list(o))
            messages, seen.messages = json.loads(text), json.loads(text)
            for part in (p for m in seen.messages if isinstance(m.get("content"), list) for p in m["content"]):
                if part.get("type") in ("input_text", "output_text"):
                    part["type"] = "text"  # its name in /tokenize, which makes the hinted prompt
            if tools := kwargs.get("tool_dicts"):
                seen.template["tools"] = tools
        # A client's max_tokens may be over the context, and its user can't change it (Claude Code asks for 32,000).
        # vLLM refuses that when it renders the prompt, although it can sample as many tokens as fit.
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
    """Why an answer sampled with these vLLM SamplingParams is not a sample of the plain policy; "" if it is."""
    from vllm import SamplingParams

    if params.temperature < MIN_TEMPERATURE:
        return f"temperature {params.temperature:g} is below {MIN_TEMPERATURE}"
    plain = SamplingParams()
    changed = [name for name in OFF_POLICY if getattr(params, name) not in (None, [], {}, getattr(plain, name))]
    if "top_k" in changed and params.top_k == -1:  # off, as is the default
        changed.remove("top_k")
    return f"sampled with {', '.join(changed)}" if changed else ""


class Recorder:
    """The engine as vLLM's app sees it: `generate` also records the turn; everything else is passed on.

    Relied on in vLLM 0.32.0: the app asks either for new tokens as they come, or for the whole answer once, at its end.
    """

    def __init__(self, p: Program) -> None:
        self._p = p

    def __getattr__(self, name: str) -> Any:
        return getattr(self._p.engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        request = asked.get()
        sampling_params.seed = swap.usable_seed(self._p.engine, sampling_params.seed)
        # Not captured, or `note_rendered` saw no messages.
        if request is None or request.path != CHAT and not request.messages:
            async with await self.start(prompt, sampling_params, request_id, *args, **kwargs) as outputs:
                async for output in outputs:
                    yield output
            return

        # vLLM calls this only with a valid prompt, so only now does the request count as a next message.
        session, dropped, continued = await self._p.write(self.link, request)
        if kwargs.get("lora_request"):  # vLLM sets it only if the client asks for the starting weights
            dropped = "answered by the starting weights"
        for earlier in continued:
            if await self._p.admit(earlier, request.user.name):
                self._p.to_judge.put_nowait(earlier)
        # The id that the client gets. (/v1/responses appends the number of its call to the engine.)
        request.turn_id = turn_id = request_id.removesuffix("_0") if request.path == RESPONSES else request_id
        if sampling_params.logprobs is None and not sampling_params.logprob_token_ids:
            sampling_params.logprobs = 0  # only the sampled token's; the client doesn't see it
        # What all choices' turns share
        shared = {"session": session, "user": request.user.name, "messages": request.messages}
        shared |= {"template": request.template, **keys_of(request.messages)}
        seen: dict[int, tuple[list[int], list[float], list[str]]] = {}  # by choice index, for n > 1
        written: set[int] = set()

        async def write(index: int, finish_reason: str | None, spans: list, why_not: str | None) -> None:
            ids, logprobs, texts = seen[index]
            served = swap.served_step(self._p.owner_of(request.user.name))
            if finish_reason not in ("stop", "length", "repetition"):  # "abort": the engine is stopping
                why_not = "cut short: the client hung up, or the engine stopped"
            elif served is not None and any(version > served for version, _, _ in spans):
                why_not = journal.UNDONE
            text = "".join(texts)
            request.answers[index] = request.digest_of({"role": "assistant", "content": text})
            turn = Turn(
                id=choice_id(turn_id, index),
                answer=request.answers[index],
                **shared,
                text=text,
                finish_reason=finish_reason,
                prompt_ids=prompt["prompt_token_ids"],
                response_ids=ids,
                logprobs=logprobs,
                versions=spans,
                temperature=sampling_params.temperature,
                no_rl=why_no_rl(sampling_params),
            )
            await self._p.write(journal.record_turn, turn, why_not)
            written.add(index)

        try:
            async with await self.start(prompt, sampling_params, request_id, *args, **kwargs) as outputs:
                async for output in outputs:
                    for choice in output.outputs:  # only what is new
                        ids, logprobs, texts = seen.setdefault(choice.index, ([], [], []))
                        ids += choice.token_ids
                        pairs = zip(choice.logprobs or [], choice.token_ids, strict=True)
                        logprobs += [at[i].logprob for at, i in pairs]
                        texts.append(choice.text)
                        if choice.finish_reason is not None and choice.index not in written:
                            spans = [(int(s.version), s.start, s.end) for s in choice.weight_versions or []]
                            await write(choice.index, choice.finish_reason, spans, dropped)
                    yield output
        finally:
            # Cut short: the client hung up, or the engine failed. Recorded for people to read, never trained on.
            for index, (ids, _, _) in seen.items():
                if index not in written:
                    await write(index, None, [(-1, 0, len(ids))], None)  # -1: the version is unknown

    async def start(self, prompt: Any, *args: Any, **kwargs: Any) -> aclosing:
        """Load the caller's adapter, and return the engine's outputs with the caller's weights. Iterate at once: until
        then nothing keeps the adapter in the engine. The prompt is salted here, since its salt must match the weights.
        aclosing: if the client hangs up, the engine must stop at once, not when the generator is garbage-collected."""
        await self._p.load_adapter(caller.get())
        owner, prompt = self._p.owner_of(caller.get()), swap.salted(prompt, caller.get())
        return aclosing(swap.generate(self._p.engine, owner, prompt, *args, **kwargs))

    def link(self, db: sqlite3.Connection, request: Asked) -> tuple[str, str | None, list[str]]:
        """Find the turn that this request continues, and record the request as that turn's next message.

        Returns the new turn's session, why it is not trained on (if that is known already), and the ids of the turns
        that are to be judged."""
        side = request.side or asked_by_the_client(request.messages)
        found = find_turns(db, request.user.name, request.messages, request.session)
        session = request.session or (found[0][0]["session"] if found else uuid.uuid4().hex[:12])
        if not request.user.trained:
            return session, journal.UNTRAINED, []
        why_not = journal.SESSION_OVER if request.done else None
        if side:
            why_not = "side request" + (", by its header" if request.side else ": the client's own, not a person's")
        return session, why_not, record_following(db, found, side, request.done)


# ---- the app ----


def kept_alive(content: AsyncIterator[str], **options: Any) -> StreamingResponse:
    from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

    return StreamingResponse(with_sse_keep_alive(content, swap.KEEP_ALIVE_S), **options)


def own_error(request: Request, error: Exception) -> JSONResponse:
    """An error in one of our own routes. vLLM's app has handlers for its routes."""
    return openai_error(500, f"{type(error).__name__}: {error}", "server_error")


async def build_app(p: Program, more: Sequence[Route]) -> ASGIApp:
    """vLLM's OpenAI app and `more` routes, behind the capture.

    Relied on in vLLM 0.32.0: `build_app` and `init_app_state` are called as its own launcher does, and the app reaches
    the engine only through the object given to `init_app_state`.
    """
    from vllm.entrypoints.anthropic import api_router as messages_router
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app
    from vllm.entrypoints.openai.responses import api_router as responses_router
    from vllm.lora.request import LoRARequest

    # vLLM sends comments in a silent stream only for chat completions.
    for router in (messages_router, responses_router):
        router.StreamingResponse = kept_alive
    tasks = await p.engine.get_supported_tasks()
    vllm_app = build_vllm_app(p.engine_args, tasks, p.engine.model_config)
    await init_app_state(Recorder(p), vllm_app.state, p.engine_args, tasks)
    note_rendered(vllm_app.state.online_renderer)
    if p.config.lora_rank:
        # The entry in vLLM's list of adapters by which clients ask for the starting weights.
        name = p.config.name + swap.FIRST_WEIGHTS
        vllm_app.state.openai_serving_models.lora_requests[name] = LoRARequest(name, 1, "none")
    vllm_app.state.server = SimpleNamespace()  # vLLM tells this to exit when the engine dies; swap.watch does it here

    app = Starlette(routes=[*more, Mount("/", app=vllm_app)], exception_handlers={Exception: own_error})
    capture = Capture(app, p)
    # CORS is outermost: a preflight request has no key, and the browser must be able to read a 401.
    return CORSMiddleware(capture, allow_origins=p.config.web_origins, allow_methods=["*"], allow_headers=["*"])
