"""A judge's OpenAI-compatible endpoint: the request fields that it refuses are remembered, and after failures it is
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

TRIES = 3  # for a turn that the judge refuses
OF_REQUEST = (400, 403, 422)  # refused because of this request; OpenAI forbids log-probs of some models with a 403
HOPELESS = (*OF_REQUEST, 401, 404, 429)  # an immediate retry won't help
ONE_CHOICE = "one completion choice"  # in llama.cpp's error for n > 1, which has status 500
# Fields that an endpoint may refuse, in the order in which they are dropped, and what its error says then.
OPTIONAL = {"max_tokens": r"\bmax_tokens\b", "temperature": r"\btemperature\b", "n": rf"\bn\b|{ONE_CHOICE}"}
CONTEXT = r"context (length|size|window|of \d)|max_new_tokens"  # in an error about a prompt with max_tokens
LEAST_TOKENS = 256  # a smaller max_tokens is not tried


class JudgeError(RuntimeError):
    """The judge gave no verdict; a failure is never a score of 0. `of_turn`: the cause is in this turn, so a retry will
    hardly help. Otherwise it is in the endpoint, which may ask for a pause of `retry_after` seconds."""

    def __init__(self, message: str, of_turn: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.of_turn, self.retry_after = of_turn, retry_after


@dataclass
class Health:
    """While a judge gives no verdict at all, pauses grow and at most one line a minute is logged. A turn is given up
    only if it fails several times while other turns get verdicts. Otherwise the judge itself is at fault."""

    until: float = 0.0  # end of the pause, time.monotonic()
    seconds: float = 1.0  # length of the last pause
    logged: float = -math.inf  # when the last line was logged, time.monotonic()
    tries: Counter[str] = field(default_factory=Counter)  # turn id -> failures caused by the turn (`of_turn`)
    failures: int = 0
    error: str = ""  # the last one
    failing: set[str] = field(default_factory=set)  # turns that failed since the last verdict, and still wait
    outlasted: set[str] = field(default_factory=set)  # turns in `tries` that another turn's verdict came after

    async def wait(self) -> None:
        while (left := self.until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def failed(self, turn_id: str, error: JudgeError) -> bool:
        """Note a failure. True if the turn should be given up."""
        now = time.monotonic()
        self.failures, self.error = self.failures + 1, str(error)
        self.failing.add(turn_id)
        self.tries[turn_id] += error.of_turn
        alone, often = error.of_turn and self.failing == {turn_id}, self.tries[turn_id] >= TRIES
        blames_turn = alone and (not often or turn_id in self.outlasted)
        given_up = blames_turn and often
        if now >= self.until and not blames_turn:  # of parallel failures, one counts
            self.seconds = min(300.0, 2 * self.seconds)
            self.until = now + max(self.seconds, min(error.retry_after, 3600.0))
        if now - self.logged >= 60:
            self.logged = now
            print(f"judge: {error}; next try in {max(0.0, self.until - now):.0f} s", file=sys.stderr, flush=True)
        if given_up:
            self.settled(turn_id)
        return given_up

    def worked(self, turn_id: str) -> None:
        self.seconds = 1.0
        self.settled(turn_id)
        self.outlasted |= self.tries.keys()

    def settled(self, turn_id: str) -> None:
        self.failing.clear()
        self.tries.pop(turn_id, None)
        self.outlasted.discard(turn_id)


def connect(url: str) -> openai.AsyncOpenAI:
    """A client for another judge's endpoint; its key is read from JUDGE_API_KEY."""
    return openai.AsyncOpenAI(base_url=url, api_key=os.environ.get("JUDGE_API_KEY", "none"))


@dataclass
class Endpoint:
    """A judge's endpoint, and the request fields that it refuses."""

    client: openai.AsyncOpenAI
    model: str
    timeout_s: float = 120  # for each request
    retries: int = 2
    backoff_s: float = 1
    refused: frozenset[str] = frozenset()  # of OPTIONAL

    def __post_init__(self) -> None:
        self.client = self.client.with_options(max_retries=0)  # `with_retries` also covers bad and slow replies

    async def send(self, **request: Any) -> Any:
        """Send a request without the fields that this endpoint refuses. The first requests show which these are.

        A "bad request" error usually names the field. If not, the fields are dropped one by one, but only from a
        request without `extra_body`. If prompt and max_tokens are over the judge's context, max_tokens is halved.
        ConnectionError if the reply is not a chat completion, ValueError if it has no choices."""
        refused, limit = list(self.refused), request["max_tokens"]
        while True:
            fields = {k: v for k, v in (request | {"max_tokens": limit}).items() if k not in refused}
            if "max_tokens" in refused:  # newer endpoints have another name for it
                fields["max_completion_tokens"] = limit
            try:
                async with asyncio.timeout(self.timeout_s):  # in total; the client's own timeout is per read
                    reply = await self.client.chat.completions.create(model=self.model, **fields)
            except TimeoutError as e:
                raise TimeoutError(f"no reply within {self.timeout_s:g} s") from e
            except openai.APIStatusError as e:
                left = [name for name in OPTIONAL if name in fields]
                said = re.sub(r"\\+[a-z]", " ", e.response.text)  # JSON's "\n" for a newline does not name n
                named = [name for name in left if re.search(OPTIONAL[name], said)]
                if e.status_code in (400, 422) and limit > LEAST_TOKENS and re.search(CONTEXT, said):
                    limit //= 2
                elif e.status_code in (400, 422) and (named or left and not request["extra_body"]):
                    refused.append((named or left)[0])
                elif e.status_code >= 500 and ONE_CHOICE in said and "n" in left:
                    refused.append("n")
                else:
                    raise
                continue
            if not (choices := getattr(reply, "choices", None)):
                kind = (
                    ValueError if choices == [] else ConnectionError
                )  # the prompt is blocked; an error with status 200
                raise kind(f"not a chat completion: {str(reply)[:300]}")
            if new := set(refused) - self.refused:
                print(f"judge: the endpoint refuses {', '.join(sorted(new))}; no longer sent", flush=True)
                self.refused |= new
            return reply

    async def with_retries(self, ask: Callable[[dict], Awaitable[Any]], all_fields: list[dict]) -> Any:
        """The result of `ask(fields)`, with up to `retries` more tries if it fails or is slow; JudgeError if all fail.

        If the request is refused, the next of `all_fields` is tried: the endpoint may refuse a field that it doesn't
        know. If that works, the refused ones are removed from `all_fields`, which parallel calls share.
        """
        failures, left = 0, list(all_fields)
        while True:
            try:
                result = await ask(left[0])
                all_fields[:] = [fields for fields in all_fields if fields in left]
                return result
            except (openai.APIError, OSError, ValueError, AttributeError, TypeError, LookupError) as error:
                # OSError: a timeout, and what `send` raises. The last three: a choice that the client doesn't check.
                status = error.status_code if isinstance(error, openai.APIStatusError) else 0
                if status in OF_REQUEST and len(left) > 1:
                    del left[0]
                    continue
                failures += 1
                if failures > self.retries or status in HOPELESS:
                    of_turn = status in OF_REQUEST or not isinstance(error, openai.APIError | OSError)
                    header = error.response.headers.get("retry-after", "") if status else ""
                    wait = float(header) if re.fullmatch(r"\d{1,6}(\.\d+)?", header) else 0.0
                    cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) else ""
                    message = f"no verdict from the judge: {type(error).__name__}: {str(error)[:300]}{cause}"
                    raise JudgeError(message, of_turn, wait) from error
                await asyncio.sleep(self.backoff_s * 2 ** (failures - 1))
