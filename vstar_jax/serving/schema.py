"""OpenAI's chat protocol as far as the server speaks it: what a client may send, and what it gets."""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Sent(BaseModel):
    """A field that the server does not know is refused, not passed over."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Sent):
    """Words."""

    type: Literal["text"]
    text: str


class Url(_Sent):
    """A data URL; detail is taken and has no effect, pictures have one size."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Sent):
    """A picture."""

    type: Literal["image_url"]
    image_url: Url


class VideoPart(_Sent):
    """A clip as a video file."""

    type: Literal["video_url"]
    video_url: Url


class FramesPart(_Sent):
    """A clip as its frames, image data URLs, `fps` of them a second."""

    type: Literal["video"]
    video: Annotated[tuple[str, ...], Field(min_length=1)]
    fps: Annotated[float, Field(gt=0, le=240, allow_inf_nan=False)] = 2.0


Part = Annotated[TextPart | ImagePart | VideoPart | FramesPart, Field(discriminator="type")]


class ChatMessage(_Sent):
    """One message; developer means system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Part, ...]
    name: str | None = None


class StreamOptions(_Sent):
    """include_usage: a last piece tells the tokens."""

    include_usage: bool = False


class ChatRequest(_Sent):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[tuple[str, ...], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a reply."""
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(text for text in given if text)


def usage(prompt: int, written: int) -> dict[str, int]:
    """Tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def completion(name: str, model: str, text: str, reason: str, tokens: dict[str, int]) -> dict[str, Any]:
    """A whole reply."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {**_head(name, "chat.completion", model), "choices": [choice], "usage": tokens}


def piece(name: str, model: str, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """A piece of a streamed reply."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return {**_head(name, "chat.completion.chunk", model), "choices": [choice]}


def last_piece(name: str, model: str, tokens: dict[str, int]) -> dict[str, Any]:
    """What tells the tokens of a streamed reply."""
    return {**_head(name, "chat.completion.chunk", model), "choices": [], "usage": tokens}


def error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(name: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}
