"""A judge's endpoint, any that calls itself OpenAI-compatible: what it refuses is found out once, and one that fails is
left alone for a while."""

import asyncio
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import openai

TRIES = 3  # of a turn that the judge refuses
BAD_REQUEST = (openai.BadRequestError, openai.UnprocessableEntityError)
# What endpoints refuse of a request, in the order in which it is tried, and what they are sent instead.
INSTEAD: dict[str, Callable[[Any], dict]] = {
    "max_tokens": lambda tokens: {"max_completion_tokens": tokens},
    "temperature": lambda _: {},
    "n": lambda _: {},
}


class JudgeError(RuntimeError):
    """The judge gave no verdict: a failure is never a score of 0. `of_turn`: it lies in what was asked, so asking again
    will hardly help; otherwise in the endpoint, which may want to be left alone for `retry_after` seconds."""

    def __init__(self, message: str, of_turn: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.of_turn, self.retry_after = of_turn, retry_after


@dataclass
class Health:
    """Growing pauses while a judge gives no verdict at all, with at most one log line a minute. A turn is given up only
    if it fails several times and no other turn does."""

    until: float = 0.0  # of the pause, time.monotonic()
    seconds: float = 1.0  # of the last pause
    logged: float = -math.inf
    tries: Counter[str] = field(default_factory=Counter)  # turn id -> failures that lay in what was asked
    failures: int = 0
    error: str = ""  # the last one
    failing: set[str] = field(default_factory=set)  # turns without a verdict since the last one that got one

    async def wait(self) -> None:
        while (left := self.until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def failed(self, turn_id: str, error: JudgeError) -> bool:
        """Is this turn to be given up? Only where no other turn fails: a judge that refuses all is at fault itself."""
        now = time.monotonic()
        self.failures, self.error = self.failures + 1, str(error)
        self.failing.add(turn_id)
        self.tries[turn_id] += error.of_turn
        if now >= self.until and not (error.of_turn and len(self.failing) == 1):  # of several at a time one counts
            self.seconds = min(300.0, 2 * self.seconds)
            self.until = now + max(self.seconds, min(error.retry_after, 3600.0))
        if now - self.logged >= 60:
            self.logged = now
            print(f"judge: {error}; next try in {max(0.0, self.until - now):.0f} s", file=sys.stderr, flush=True)
        return self.tries[turn_id] >= TRIES and self.failing == {turn_id}

    def worked(self, turn_id: str) -> None:
        self.seconds = 1.0
        self.failing.clear()
        self.tries.pop(turn_id, None)


def connect(url: str) -> openai.AsyncOpenAI:
    """A client of a judge elsewhere; its key is read from JUDGE_API_KEY."""
    return openai.AsyncOpenAI(base_url=url, api_key=os.environ.get("JUDGE_API_KEY", "none"))


@dataclass
class Endpoint:
    """Where a judge is asked, and which fields of a request it refuses."""

    client: openai.AsyncOpenAI
    model: str
    timeout_s: float = 60
    retries: int = 2
    backoff_s: float = 1
    refused: frozenset[str] = frozenset()  # of INSTEAD

    def __post_init__(self) -> None:
        self.client = self.client.with_options(max_retries=0)  # ours also cover nonsense and slowness

    async def send(self, **request: Any) -> Any:
        """One request, without the fields that this endpoint refuses: it is found out once what they are.

        A "bad request" usually names the field. Where it doesn't, all are tried, once the extra ones are gone."""
        refused = list(self.refused)
        while True:
            fields = {k: v for k, v in request.items() if k not in refused}
            fields |= {k: v for name in refused if name in request for k, v in INSTEAD[name](request[name]).items()}
            try:
                reply = await self.client.chat.completions.create(model=self.model, **fields)
            except BAD_REQUEST as e:
                left = [name for name in INSTEAD if name in fields]
                named = [name for name in left if re.search(rf"\b{name}\b", e.response.text)]
                if not (named or left and not request["extra_body"]):
                    raise
                refused.append((named or left)[0])
                continue
            if new := set(refused) - self.refused:
                print(f"judge: the endpoint refuses {', '.join(sorted(new))}; asked without from here on", flush=True)
                self.refused |= new
            return reply

    async def with_retries(self, ask: Callable[[dict], Awaitable[Any]], all_fields: list[dict]) -> Any:
        """What `ask(fields)` returns, after `retries` more tries where it fails or is slow; JudgeError where all fail.

        A "bad request" is tried again with the next of `all_fields`: perhaps the endpoint refuses a field that it
        doesn't know. Where that helps, it isn't sent the refused fields again.
        """
        failures = refused = 0
        while True:
            try:
                async with asyncio.timeout(self.timeout_s):  # all of it, where the client's own timeout is per read
                    result = await ask(all_fields[refused])
                del all_fields[:refused]
                return result
            except (openai.APIError, TimeoutError, ValueError, AttributeError, TypeError, LookupError) as error:
                # the last three: JSON of another form than that of a reply, which the client lets through
                bad_request = isinstance(error, BAD_REQUEST)
                if bad_request and refused + 1 < len(all_fields):
                    refused += 1
                    continue
                failures += 1
                status = error.status_code if isinstance(error, openai.APIStatusError) else 0
                if status in (400, 401, 403, 404, 422, 429):
                    failures = self.retries + 1  # asking again at once won't help
                if failures > self.retries:
                    of_turn = bad_request or not isinstance(error, openai.APIError | TimeoutError)
                    header = error.response.headers.get("retry-after", "") if status else ""
                    wait = float(header) if re.fullmatch(r"\d{1,6}(\.\d+)?", header) else 0.0
                    message = f"no verdict from the judge: {type(error).__name__}: {str(error)[:300]}"
                    raise JudgeError(message, of_turn, wait) from error
                await asyncio.sleep(self.backoff_s * 2 ** (failures - 1))
