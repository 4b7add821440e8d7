"""One language model behind any endpoint that speaks OpenAI's chat protocol, asked by many clips at once.

All tries of a question share one deadline, pauses between them are drawn at random, and a pause that the endpoint asks for is
kept. Requests a minute and requests at a time are bounded, tokens and their cost are counted. No error repeats what the
endpoint said, since that can quote the key.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from vstar_jax.errors import UserError

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds before the second try, doubled for each later one, and the most that they grow to."""
FATAL = {401: "the key is refused", 403: "the key may not do this", 404: "there is no such address or model"}

Read = TypeVar("Read")


@dataclass(frozen=True)
class EndpointSettings:
    """Whom to ask and how.

    url: base URL; model: its name there; concurrency: questions at a time; per_minute: requests a minute, 0 for no bound;
    attempts: tries of a question; attempt_seconds: of one try; seconds: of a question with all its tries; max_tokens,
    temperature: of a reply; stream: take replies in pieces, as some endpoints want it; prices: of a million prompt tokens and
    of a million written ones, in whatever currency.
    """

    url: str
    model: str
    concurrency: int = 8
    per_minute: float = 0.0
    attempts: int = 5
    attempt_seconds: float = 120.0
    seconds: float = 300.0
    max_tokens: int = 1024
    temperature: float = 0.7
    stream: bool = False
    prices: tuple[float, float] = (0.0, 0.0)


class EndpointError(Exception):
    """A question without a usable reply, in one sentence."""


class ReplyError(ValueError):
    """Why a reply is of no use; another try may give a better one."""


class _Again(Exception):
    """A try that failed, of a kind that another may mend; pause: seconds that the endpoint asks for."""

    def __init__(self, reason: str, kind: str, pause: float = 0.0):
        super().__init__(reason)
        self.kind, self.pause = kind, pause


@dataclass
class Usage:
    """Tokens of all tries that were answered, and how the tries ended."""

    prompt: int = 0
    written: int = 0
    tries: Counter[str] = field(default_factory=Counter)

    def cost(self, prices: Sequence[float]) -> float:
        """What the tokens cost; prices: of a million prompt tokens and of a million written ones."""
        return (self.prompt * prices[0] + self.written * prices[1]) / 1e6


class Endpoint:
    """For one event loop; closed with `close`. usage: of everything so far."""

    def __init__(self, settings: EndpointSettings, key: str):
        import openai

        if not settings.url.startswith(("http://", "https://")):
            raise UserError(f"the endpoint's address {settings.url!r} has no http:// or https:// before it: give its base URL.")
        self.settings, self.usage = settings, Usage()
        self._client = openai.AsyncOpenAI(api_key=key, base_url=settings.url, max_retries=0)
        self._slots, self._next = asyncio.Semaphore(settings.concurrency), 0.0

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, Any]], read: Callable[[str], Read]) -> Read:
        """What `read` makes of the reply; it raises ReplyError for one that is of no use, and then another is asked for.

        Raises EndpointError within the deadline, and UserError when no question can ever be answered (a wrong key, address or
        model).
        """
        limit, last = self.settings.seconds, "no try was made"
        try:
            async with asyncio.timeout(limit) as deadline:
                for number in range(self.settings.attempts):
                    try:
                        return await self._try(messages, read)
                    except _Again as error:
                        self.usage.tries[error.kind] += 1
                        last, pause = str(error), error.pause
                    pause = max(min(FIRST_PAUSE * 2**number, LONGEST_PAUSE), pause) * random.uniform(1.0, 1.5)
                    if number + 1 == self.settings.attempts:
                        break
                    if asyncio.get_running_loop().time() + pause >= (deadline.when() or 0):
                        raise EndpointError(f"no usable reply within {limit:g} s, at last because {last}.")
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise EndpointError(f"no usable reply within {limit:g} s, at last because {last}.") from None
        raise EndpointError(f"no usable reply in {self.settings.attempts} tries, at last because {last}.")

    async def _try(self, messages: Sequence[Mapping[str, Any]], read: Callable[[str], Read]) -> Read:
        import openai

        async with self._slots:
            await self._turn()
            try:
                async with asyncio.timeout(self.settings.attempt_seconds):
                    text = await self._once(messages)
            except TimeoutError:
                raise _Again(f"nothing came within {self.settings.attempt_seconds:g} s", "timeout") from None
            except openai.APIStatusError as error:
                status = error.status_code
                if status in FATAL:
                    where = f"the model {self.settings.model} at {self.settings.url}"
                    raise UserError(
                        f"{where} cannot be asked, {FATAL[status]} (status {status}): check both and the key."
                    ) from None
                if status in (408, 409, 425, 429) or status >= 500:
                    pause = asked_pause(error.response.headers.get("retry-after"))
                    raise _Again(f"the endpoint answered with status {status}", str(status), pause) from None
                self.usage.tries[str(status)] += 1
                raise EndpointError(f"the endpoint refuses the request with status {status}.") from None
            except openai.APIConnectionError:
                raise _Again("the endpoint cannot be reached or broke off", "connection") from None
            except (
                openai.OpenAIError,
                json.JSONDecodeError,
                UnicodeDecodeError,
                AttributeError,
                IndexError,
                TypeError,
                ValueError,
            ):
                raise _Again("what came is no chat completion", "malformed") from None
        try:
            result = read(text)
        except ReplyError as error:
            raise _Again(f"of the reply: {error}", "unusable") from None
        self.usage.tries["ok"] += 1
        return result

    async def _turn(self) -> None:
        """Waits until the rate allows another request."""
        if not self.settings.per_minute:
            return
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now) + 60.0 / self.settings.per_minute
        await asyncio.sleep(self._next - 60.0 / self.settings.per_minute - now)

    async def _once(self, messages: Sequence[Mapping[str, Any]]) -> str:
        s = self.settings
        given: Any = dict(model=s.model, messages=list(messages), max_tokens=s.max_tokens, temperature=s.temperature)
        if not s.stream:
            reply: Any = await self._client.chat.completions.create(**given)
            self._count(reply.usage)
            text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        else:
            text, reason = "", None
            given |= {"stream": True, "stream_options": {"include_usage": True}}
            stream: Any = await self._client.chat.completions.create(**given)
            async with stream as pieces:
                async for piece in pieces:
                    self._count(getattr(piece, "usage", None))
                    if piece.choices:
                        text += piece.choices[0].delta.content or ""
                        reason = piece.choices[0].finish_reason or reason
        if not isinstance(text, str) or not text.strip() or reason is None:
            raise _Again("the reply is empty or broke off", "truncated")
        if reason == "length":
            raise _Again(f"the reply was cut at {s.max_tokens} tokens", "truncated")
        return text

    def _count(self, usage: Any) -> None:
        if usage is not None:
            self.usage.prompt += int(usage.prompt_tokens or 0)
            self.usage.written += int(usage.completion_tokens or 0)


def asked_pause(header: str | None) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 where it is neither."""
    if not header:
        return 0.0
    try:
        return max(float(header), 0.0)
    except ValueError:
        try:
            return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
        except ValueError:
            return 0.0
