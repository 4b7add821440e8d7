"""Asks an LLM behind any endpoint that is compatible with OpenAI's, so that a bad one costs little.

All tries of a call share one deadline, and pauses between them are drawn at random. After some failures in a row nothing is
sent for a while, then a single try finds out whether the endpoint is back. Replies are checked before anybody sees them. No
error repeats what the endpoint said, since that can quote the key.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from tools_server.failure import FailureStatus, ToolFailure
from tools_server.settings import LlmSettings

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.25
"""Seconds before the second try, on average; each later pause is twice as long."""
LONGEST_PAUSE = 5.0
"""Seconds of a pause that a call waits out; an endpoint that asks for a longer one is unavailable to it, at once."""
REPLY_TOKENS = 400

Observer = Callable[[str], None]
"""Told how each try went: ok, or the status of its failure."""


class _Failed(Exception):
    """A try that failed. again: another may help; pause: seconds that the endpoint asks for; fault: of the endpoint."""

    def __init__(self, status: FailureStatus, reason: str, *, again: bool = True, fault: bool = True, pause: float = 0.0):
        super().__init__(reason)
        self.failure, self.again, self.fault, self.pause = ToolFailure(status, reason), again, fault, pause


class Breaker:
    """Opens after `failures` failures in a row for `rest` seconds, then lets one try through at a time until one succeeds."""

    def __init__(self, failures: int, rest: float):
        self._most, self._rest = failures, rest
        self._failures, self._until, self._trying = 0, 0.0, False

    @property
    def open(self) -> bool:
        """Whether tries are held back."""
        return self._failures >= self._most

    def enter(self) -> bool:
        """Whether a try may begin now; each that does must `leave`."""
        if not self.open:
            return True
        if self._trying or time.monotonic() < self._until:
            return False
        self._trying = True
        return True

    def leave(self, success: bool | None) -> None:
        """Ends a try; None says nothing about the endpoint, as when the caller gave up."""
        self._trying = False
        if success:
            self._failures = 0
        elif success is False:
            self._failures += 1
            self._until = time.monotonic() + self._rest


class LlmProxy:
    """One endpoint and one model. For one event loop; closed with `close`."""

    def __init__(self, settings: LlmSettings, api_key: str, observe: Observer = lambda outcome: None):
        import openai

        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # below it they write requests
        self.model = settings.model
        self._settings, self._observe = settings, observe
        self._client = openai.AsyncOpenAI(api_key=api_key, base_url=settings.base_url, max_retries=0)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self.breaker = Breaker(settings.failures, settings.rest_seconds)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def ask(self, content: list[dict[str, Any]], read: Callable[[str], str], seconds: float) -> str:
        """What `read` makes of the reply to one user message with these parts; it gives "" for a reply that is of no use.

        Raises ToolFailure, within `seconds`: timeout, error (this request is refused), malformed (replies of no use) or
        unavailable (the endpoint fails, or has failed too often lately).
        """
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._tries(content, read, limit)
        except TimeoutError:
            raise ToolFailure("timeout", "the language model did not answer in time.") from None

    async def _tries(self, content: list[dict[str, Any]], read: Callable[[str], str], limit: asyncio.Timeout) -> str:
        now = asyncio.get_running_loop().time
        for number in range(self._settings.attempts):
            try:
                async with self._slots:
                    return await self._guarded(content, read)
            except _Failed as error:
                failed = error
            pause = max(FIRST_PAUSE * 2**number, failed.pause) * random.uniform(1.0, 1.5)
            late = failed.pause > LONGEST_PAUSE or now() + pause >= (limit.when() or 0)
            if not failed.again or number + 1 == self._settings.attempts or late:
                break
            await asyncio.sleep(pause)
        raise failed.failure

    async def _guarded(self, content: list[dict[str, Any]], read: Callable[[str], str]) -> str:
        if not self.breaker.enter():
            raise _Failed("unavailable", "the language model has failed too often lately and is left alone.", again=False)
        success: bool | None = None
        try:
            text = await self._once(content, read)
            success = True
            self._observe("ok")
            return text
        except _Failed as error:
            success = False if error.fault else None
            self._observe(error.failure.status)
            log.warning("a call of the language model failed: %s", error)
            raise
        finally:
            self.breaker.leave(success)

    async def _once(self, content: list[dict[str, Any]], read: Callable[[str], str]) -> str:
        import openai

        messages: Any = [{"role": "user", "content": content}]
        try:
            async with asyncio.timeout(self._settings.attempt_seconds):
                reply = await self._client.chat.completions.create(
                    model=self.model, messages=messages, max_tokens=REPLY_TOKENS, temperature=0.0
                )
        except TimeoutError:
            raise _Failed("timeout", f"no reply within {self._settings.attempt_seconds:g} s.") from None
        except openai.APIStatusError as error:
            raise _refused(error) from None
        except openai.APIConnectionError:
            raise _Failed("unavailable", "the endpoint cannot be reached.") from None
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError, ValueError, TypeError):
            raise _Failed("malformed", "the endpoint's reply is not a chat completion.") from None
        text = read(_content(reply))
        if not text:
            raise _Failed("malformed", "the reply holds no usable text.")
        return text


def _content(reply: Any) -> str:
    """The text of a whole reply; the client does not check what the endpoint sent, so anything may be in its place."""
    try:
        choice = reply.choices[0]
        text, reason = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        raise _Failed("malformed", "the endpoint's reply is not a chat completion.") from None
    if not isinstance(text, str) or reason not in ("stop", None):
        raise _Failed("malformed", "the reply was cut off or holds no text.")
    return text


def _refused(error: Any) -> _Failed:
    status = error.status_code
    reason = f"the endpoint answered with status {status}."
    if status in (401, 403):
        return _Failed("unavailable", reason, again=False)
    if status in (408, 409, 425, 429) or status >= 500:
        return _Failed("unavailable", reason, pause=_asked_pause(error.response.headers.get("retry-after")))
    return _Failed("error", reason, again=False, fault=False)


def _asked_pause(header: str | None) -> float:
    try:
        return max(float(header or 0), 0.0)
    except ValueError:
        return 0.0  # a date: our own pause is taken
