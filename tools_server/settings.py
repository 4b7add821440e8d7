"""The server's settings, and how flags such as --yolo.device=cuda fill them. Secrets come from the environment alone."""

import argparse
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tools_server.yolo import WEIGHTS

TOKEN_VARIABLE = "TOOLS_TOKEN"
"""Environment variable with the bearer token that clients must show."""
KEY_VARIABLES = ("DASHSCOPE_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the key of the LLM's endpoint; the first that is set counts."""

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class SettingsError(Exception):
    """One sentence: what was wrong, what is possible, what to do."""


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class YoloSettings(_Group):
    """The two models that find people."""

    detect: Path = WEIGHTS["detect"]
    """weights of the detector, a local .pt file of ultralytics"""
    pose: Path = WEIGHTS["pose"]
    """weights of the pose model, a local .pt file of ultralytics"""
    device: str = "auto"
    """auto takes CUDA if there is one; else cpu, cuda, cuda:1 and so on"""
    confidence: Share = 0.25
    """people less sure than this are left out"""
    image_size: Annotated[int, Field(ge=0)] = 0
    """longer side of the models' input in pixels; 0 takes what the weights were trained with"""
    batch: Count = 16
    """frames of a call of a model"""
    wait_ms: Annotated[float, Field(ge=0)] = 2.0
    """milliseconds that a batch which is not full waits for more frames"""
    threads: Annotated[int, Field(ge=0)] = 0
    """threads of torch on the CPU; 0 leaves them alone"""


class StyleSettings(_Group):
    """How annotated clips look."""

    background: Share = 0.25
    """brightness left to the picture under the drawing"""
    line: Annotated[float, Field(gt=0, le=1)] = 1 / 28
    """width of a limb in shares of the frame's shorter side"""
    confidence: Share = 0.3
    """keypoints less sure than this are not drawn"""


class LlmSettings(_Group):
    """The LLM that explains and describes: any endpoint that is compatible with OpenAI's."""

    base_url: str = "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"
    """address of the endpoint; DashScope has some for each region and workspace"""
    model: str = "qwen-vl-max"
    """name of the model"""
    attempts: Count = 3
    """most tries of a call"""
    attempt_seconds: Seconds = 30.0
    """a try that takes longer counts as failed"""
    concurrency: Count = 8
    """calls at once"""
    failures: Count = 5
    """failed tries in a row after which no call is made for a while"""
    rest_seconds: Seconds = 10.0
    """the length of that while"""
    pictures: Count = 4
    """key frames of a clip that are shown"""


class CacheSettings(_Group):
    """Where results stay."""

    path: Path | None = Path("runs/tools_server/cache.sqlite")
    """file of results that outlive the server; empty keeps them in memory"""
    bytes: Count = 2**30
    """most bytes of it; the least recently used results go first"""
    clip_bytes: Count = 2 * 2**30
    """most bytes of uploaded and annotated clips in memory"""
    share_clips: bool = False
    """keep uploaded clips in the file, too, where other servers that use the same file find them"""


class LimitSettings(_Group):
    """What is refused, before any work is done for it."""

    calls: Count = 2048
    """calls at once"""
    body_bytes: Count = 256 * 2**20
    """bytes of a body"""
    buffered_bytes: Count = 2 * 2**30
    """bytes of all bodies at once"""
    body_seconds: Seconds = 30.0
    """seconds in which a body must arrive"""
    frames: Count = 256
    """frames of a clip, and frames asked for by a request"""
    pixels: Count = 4096 * 2304
    """pixels of a frame"""
    labels: Count = 1024
    """labels of a request"""
    label_chars: Count = 200
    """characters of a label"""
    queue: Count = 8192
    """frames that wait for the models"""
    seconds: Seconds = 120.0
    """longest timeout of a call; a longer one is cut to it"""
    drain_seconds: Count = 30
    """seconds that accepted calls have to finish after a request to stop"""


class Settings(_Group):
    """All settings of a server."""

    host: str = "127.0.0.1"
    """address to listen on; any other than this machine's own needs a token in the environment variable TOOLS_TOKEN"""
    port: Annotated[int, Field(ge=0, lt=65536)] = 8765
    """port to listen on; 0 takes a free one"""
    exit_with_parent: bool = False
    """stop when standard input closes, as it does when the program that started the server ends in any way"""
    mcp: bool = True
    """offer the tools over MCP, too, at /mcp"""
    glossary: Path | None = None
    """JSON file of explanations, {label: explanation} or {number: "label: explanation"}"""
    describer: Literal["auto", "llm", "offline"] = "auto"
    """who describes clips: the LLM, or sentences made of measured motion; auto takes the LLM if there is a key for it"""
    yolo: YoloSettings = YoloSettings()
    style: StyleSettings = StyleSettings()
    llm: LlmSettings = LlmSettings()
    cache: CacheSettings = CacheSettings()
    limits: LimitSettings = LimitSettings()

    @property
    def loopback(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse(argv: Sequence[str]) -> Settings:
    """Flags -> settings. Raises SettingsError for a value that is not possible; --help and unknown flags end the program."""
    parser = argparse.ArgumentParser(
        "python -m tools_server",
        description="Serves the policy's tools over HTTP.",
        epilog=f"Secrets come from the environment: {TOKEN_VARIABLE} holds the bearer token of clients, "
        f"{' or '.join(KEY_VARIABLES)} the LLM's key. Without a key the server works offline.",
        allow_abbrev=False,
    )
    for key, default, text in _leaves(Settings(), ""):
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
        shown = str(default).lower() if isinstance(default, bool) else default if default is not None else "none"
        flag = key.replace("_", "-")
        flags = [f"--{key}"] if flag == key else [f"--{key}", f"--{flag}"]
        parser.add_argument(*flags, dest=key, metavar="X", help=f"{text} ({shown})".replace("%", "%%"), **switch)
    tree: dict[str, Any] = {}
    for key, text in vars(parser.parse_args(argv)).items():
        if text is not None:
            *groups, name = key.split(".")
            at = tree
            for group in groups:
                at = at.setdefault(group, {})
            at[name] = None if text == "" else text
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise SettingsError(f"--{name} is {first['input']!r}, but {reason}.") from None


def _leaves(group: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, field.description or ""
