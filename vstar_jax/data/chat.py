"""Dialogues as tokens: the chat template and tokenizer of a model directory, pictures in their places, targets marked.

Messages come in Hugging Face's chat format, from the datasets and the two-stage dialogue; training and rollout take the
`batch.Example` that comes out. Text is data: special tokens written in it stay ordinary text, so that no label and no tool
can close a turn or forge a picture.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vstar_jax.batch import MERGE, PATCH_VALUES, Example
from vstar_jax.config import VideoConfig
from vstar_jax.data.patches import window_order
from vstar_jax.data.positions import positions
from vstar_jax.data.processor import ProcessedClip, process
from vstar_jax.errors import UserError

Message = Mapping[str, Any]
Target = Literal["assistant", "all"]

# Characters of private use stand for a text while the template is rendered, so that template and text can be told apart.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000(\\d+)\ue001")

PROMPTS_KEPT = 256
"""Texts of prompts whose tokens are kept."""
_EMPTY_TURNS = tuple({"role": role, "content": [{"type": "text", "text": ""}]} for role in ("user", "assistant"))


@dataclass(frozen=True)
class _Text:
    """A text that fills a place in the template; spoken: by the assistant, so that it is a target."""

    content: str
    spoken: bool


@dataclass(frozen=True)
class _Tokens:
    """Token ids [S]; spoken, bool [S]: the assistant's words and the end of its turn."""

    ids: np.ndarray
    spoken: np.ndarray


class Chat:
    """The tokenizer and chat template of a model directory; safe to share between threads.

    video: how `clip` prepares frames. stop_ids int32 [N]: the tokens that end a reply.
    """

    def __init__(self, path: str | Path, video: VideoConfig):
        from transformers import AutoTokenizer

        path = Path(path)
        for name in ("config.json", "tokenizer_config.json"):
            if not (path / name).is_file():
                raise UserError(f"{path} has no {name}: give a model directory in Hugging Face format.")
        self.tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        if not self.tokenizer.chat_template:
            raise UserError(f"{path} has no chat template: add chat_template.jinja to the model directory.")
        if not self.tokenizer.is_fast:
            raise UserError(f"{path} has no tokenizer.json: convert its tokenizer to the fast format.")
        self.video = video
        # With this the backend splits special tokens found in text; those of the template are looked up in `_special`.
        self._backend = self.tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        # Prompts are long and, with one list of labels, the same for most clips; what the policy says is not.
        self._prompt_ids = lru_cache(PROMPTS_KEPT)(self._ids)
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token.content: index for index, token in added if token.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        settings = json.loads((path / "config.json").read_text())
        self.image_pad: int = settings["image_token_id"]
        self.video_pad: int = settings["video_token_id"]
        around = [self._special[name] for name in ("<|vision_start|>", "<|vision_end|>") if name in self._special]
        self.visual_ids = np.asarray([self.image_pad, self.video_pad, *around])
        self.tokens_per_second: float = settings["vision_config"].get("tokens_per_second", 4)
        self.stop_ids = np.asarray(sorted({self._turn_end(), *_end_ids(path), self.tokenizer.eos_token_id} - {None}), np.int32)

    def clip(self, frames: np.ndarray, fps: float) -> ProcessedClip:
        """Frames uint8 [T, H, W, 3] at `fps` frames a second, prepared for this chat's dialogues."""
        return process(frames, fps, self.video)

    def encode(
        self,
        messages: Sequence[Message],
        clips: Sequence[ProcessedClip] = (),
        add_generation_prompt: bool = False,
        target: Target = "assistant",
    ) -> Example:
        """A dialogue as an Example.

        messages: {"role", "content"}, the content a text or a list of {"type": "video"}, {"type": "image"} and {"type": "text",
        "text": ...}; clips: one for each video and image, in order. Targets are the assistant's words and the end of its turn,
        or with "all" every token that is no part of a picture. ValueError when clips and messages do not match.
        """
        return self._example(self._tokenise(messages, add_generation_prompt), clips, target)

    def encode_continuation(self, messages: Sequence[Message], clips: Sequence[ProcessedClip], start: int) -> Example:
        """What follows a reply: the next user turn and the generation prompt, without a target.

        It begins right after the end-of-turn token that closed the reply, and positions count from `start`, one more than the
        largest position before it.
        """
        tokens = self._tokenise([*_EMPTY_TURNS, *messages], add_generation_prompt=True)
        cut = int(np.argmax(tokens.spoken)) + 1
        example = self._example(_Tokens(tokens.ids[cut:], tokens.spoken[cut:]), clips, "assistant")
        return replace(example, positions=example.positions + np.int32(start))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens int [S], without special tokens."""
        ids = np.asarray(tokens).tolist()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _turn_end(self) -> int:
        """The token that the template puts after the assistant's words."""
        tokens = self._tokenise(_EMPTY_TURNS, add_generation_prompt=False)
        if tokens.spoken.sum() != 1:
            raise UserError("the chat template does not close the assistant's turn with a special token: use one that does.")
        return int(tokens.ids[tokens.spoken][0])

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []

    def _tokenise(self, messages: Sequence[Message], add_generation_prompt: bool) -> _Tokens:
        ids: list[int] = []
        spoken: list[bool] = []
        plain, closing = "", False

        def flush(text: str, is_spoken: bool) -> None:
            found = self._ids(text) if is_spoken else self._prompt_ids(text)
            ids.extend(found)
            spoken.extend([is_spoken] * len(found))

        for piece in self._render(messages, add_generation_prompt):
            if isinstance(piece, _Text) and piece.spoken:
                # Tokenised apart from the turn's header, as the policy that continues the header would write it.
                flush(plain, False)
                flush(piece.content, True)
                plain, closing = "", True
            elif isinstance(piece, _Text):
                plain += piece.content
            else:
                for n, part in enumerate(self._special_pattern.split(piece)):
                    if n % 2:
                        flush(plain, False)
                        ids.append(self._special[part])
                        spoken.append(closing and not plain)
                        plain, closing = "", False
                    else:
                        plain += part
        flush(plain, False)
        return _Tokens(np.asarray(ids, np.int32), np.asarray(spoken, bool))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[str | _Text]:
        """The rendered template in pieces: its own wording, and the texts of the messages."""
        texts: list[_Text] = []

        def mark(text: str, role: str) -> str:
            texts.append(_Text(text, role == "assistant"))
            return _MARK.format(len(texts) - 1)

        def marked(message: Message) -> dict[str, Any]:
            role, content = message["role"], message["content"]
            if isinstance(content, str):
                return {"role": role, "content": mark(content, role)}
            parts = [{**p, "text": mark(p["text"], role)} if p["type"] == "text" else {"type": p["type"]} for p in content]
            return {"role": role, "content": parts}

        rendered = self.tokenizer.apply_chat_template(
            [marked(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
        for n, piece in enumerate(_MARKED.split(str(rendered))):
            yield texts[int(piece)] if n % 2 else piece

    def _example(self, tokens: _Tokens, clips: Sequence[ProcessedClip], target: Target) -> Example:
        ids, counts = self._expand(tokens.ids, clips)
        is_pad = (ids == self.image_pad) | (ids == self.video_pad)
        visual_index = np.full(len(ids), -1, np.int32)
        layouts = [window_order(clip.grid) for clip in clips]
        firsts = np.cumsum([0, *(len(layout.inverse) for layout in layouts)])
        if clips:
            visual_index[is_pad] = np.concatenate([f + x.inverse for f, x in zip(firsts, layouts, strict=False)])
        loss_mask = np.repeat(tokens.spoken, counts) if target == "assistant" else ~np.isin(ids, self.visual_ids)
        loss_mask[:1] = False  # nothing stands before the first token that could predict it
        return Example(
            tokens=ids,
            positions=positions(
                ids,
                [clip.grid for clip in clips],
                [clip.second_per_grid for clip in clips],
                self.tokens_per_second,
                self.image_pad,
                self.video_pad,
            ),
            loss_mask=loss_mask,
            visual_index=visual_index,
            patches=_joined([clip.patches for clip in clips], np.uint8, PATCH_VALUES),
            patch_hw=_joined([layout.patch_hw for layout in layouts], np.int32, 2),
            window_id=_numbered([x.window_id for x in layouts]),
            frame_id=_numbered([x.frame_id for x in layouts]),
        )

    def _expand(self, ids: np.ndarray, clips: Sequence[ProcessedClip]) -> tuple[np.ndarray, np.ndarray]:
        """Repeats each pad for the visual tokens of its clip; also returns how often each token stands now."""
        pads = np.flatnonzero((ids == self.image_pad) | (ids == self.video_pad))
        wanted = [self.video_pad if clip.is_video else self.image_pad for clip in clips]
        if ids[pads].tolist() != wanted:
            places = ["video" if i == self.video_pad else "image" for i in ids[pads]]
            given = ["video" if clip.is_video else "image" for clip in clips]
            raise ValueError(f"the messages have places for {places} but the clips are {given}: give one for each, in order.")
        counts = np.ones(len(ids), np.int64)
        counts[pads] = [len(clip.patches) // MERGE for clip in clips]
        return np.repeat(ids, counts), counts


def _end_ids(path: Path) -> Iterator[int]:
    """The end tokens that the model directory's generation settings name, if it has any."""
    file = path / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return iter(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _joined(arrays: Sequence[np.ndarray], dtype: type, width: int) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.zeros((0, width), dtype), *arrays])


def _numbered(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Group numbers of several clips int32 [P], counted on from clip to clip."""
    numbers: list[np.ndarray] = [np.zeros(0, np.int32)]
    first = 0
    for group in groups:
        numbers.append(group + np.int32(first))
        first += int(group[-1]) + 1
    return np.concatenate(numbers)
