"""A small world for GRPO, and the program that trains in it and may be killed: grpo_program.py CONFIG.yaml.

Clips of StickMotion drawn in memory, a tokenizer and a model of two layers, and replies of a few tokens: everything real, and
as small as it can be.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from dialogues import ARCHITECTURE

from vstar_jax import config as config_module
from vstar_jax.batch import Example
from vstar_jax.config import (
    Config,
    DataConfig,
    GrpoConfig,
    PolicyConfig,
    RolloutConfig,
    SftConfig,
    ToolsConfig,
    VideoConfig,
    load,
)
from vstar_jax.data.chat import Chat
from vstar_jax.data.clips import ClipRecord
from vstar_jax.data.stick_motion import dialogues, motions, names, render, tokenizer
from vstar_jax.data.stick_motion.dialogues import draw_cast, tool_result
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Prompts, ToolResult, assistant, first_messages, second_messages
from vstar_jax.errors import run_script
from vstar_jax.models import hf
from vstar_jax.models.qwen2_5_vl import create
from vstar_jax.sharding import make_mesh
from vstar_jax.tools.host import Tools, annotations
from vstar_jax.training.grpo import GrpoRun, train_grpo
from vstar_jax.training.job import load_policy

CLIPS, FRAMES, NAMES = 12, 4, ("kaba", "tilo")
CHAIN = {
    "assistant\n": ("<think>", "<pose_estimation>", "<noun_explanation>"),
    "<pose_estimation>": ("yes",),
    "<noun_explanation>": (" yes",),
    "yes": ("</pose_estimation>",),
    " yes": ("</noun_explanation>",),
    "</pose_estimation>": ("<|im_end|>",),
    "</noun_explanation>": ("<|im_end|>",),
    "<think>": ("</think>",),
    "</think>": ("<answer>",),
    "<answer>": (" kaba", " tilo"),
    " ka": ("ba",),
    " ti": ("lo",),
    " kaba": ("</answer>",),
    " tilo": ("</answer>",),
    "</answer>": ("<|im_end|>",),
}
CONVICTION = 11.0
"""Logit of a token that follows in CHAIN, before the layers' part."""


@dataclass(frozen=True)
class Clip:
    """A clip drawn from its number."""

    number: int

    @property
    def name(self) -> str:
        return f"clip {self.number}"

    @property
    def action(self) -> motions.Action:
        return motions.actions("base")[self.number % 5]

    @property
    def label(self) -> str:
        return f"action {self.action.number}"

    @cached_property
    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 [T, 112, 112, 3] and joints float [T, 17, 3] in pixels."""
        rng = np.random.default_rng(self.number)
        keypoints = motions.keypoints(self.action.sub_motions, FRAMES, rng)
        return render.render(keypoints, rng, "cluttered"), keypoints * np.array([render.SIZE, render.SIZE, 1])


class FewClips:
    """`data.task.Task` of a few clips, with ground truth in the place of the tools."""

    groups: tuple[str, ...] = ("base",)

    def __init__(self, config: Config, chat: Chat):
        self.config, self.chat = config, chat
        self.prompts = Prompts.load(config_module.resolve(config.data.prompts))
        self.records = [Clip(n) for n in range(CLIPS)]

    def train_records(self) -> Sequence[Clip]:
        return self.records

    def test_records(self, group: str) -> Sequence[Clip]:
        return self.records[:2]

    def label_count(self, group: str) -> int:
        return len(NAMES)

    def train_clips(self) -> Sequence[ClipRecord]:
        return ()

    def test_clips(self, group: str) -> Sequence[ClipRecord]:
        return ()

    def example(self, record: Clip, rng: np.random.Generator) -> Example:
        """A lesson in the form of the replies that the model gives anyway."""
        episode = self.episode(record, rng, training=True)
        messages = [
            *first_messages(self.prompts),
            assistant("<think></think>"),
            *second_messages(self.prompts, ToolResult(), episode.labels),
            assistant(f"<think></think><answer> {episode.answer}</answer>"),
        ]
        return self.chat.encode(messages, [self.chat.clip(episode.frames, episode.fps)])

    def episode(self, record: Clip, rng: np.random.Generator, *, training: bool = False) -> Episode:
        frames, joints = record.drawn
        cast = replace(draw_cast(record.action, len(NAMES), "train", rng), names=NAMES)
        boxes = np.zeros((FRAMES, 1, 4))
        return Episode(
            name=record.name,
            group="base",
            frames=frames,
            fps=8.0,
            labels=cast.names,
            answer=cast.names[cast.shown],
            tools=partial(tool_result, frames=frames, keypoints=joints, boxes=boxes, explanations=cast.explanations),
            explanation=motions.explanation(record.action.sub_motions),
        )


def write_model(folder: Path) -> None:
    """A model of random weights in `folder` that nevertheless replies in the right form, most of the time.

    Its head favours, after a token of CHAIN, those that may follow it there; the layers between add what they like.
    """
    blank = folder.with_name("blank")
    texts = dialogues.texts(Prompts.load(config_module.resolve(DataConfig().prompts)), np.random.default_rng(0))
    pieces = {piece for text in texts for piece in re.findall(tokenizer.PIECES, text) if piece.strip() not in names.glossary()}
    ids = tokenizer.build(blank, {"user", "assistant", "system", *pieces})
    text = replace(ARCHITECTURE.text, vocab=-(-ids.size // 64) * 64, tie_embeddings=False, initializer_range=0.05)
    vision = replace(ARCHITECTURE.vision, layers=1, full_attention_layers=(0,))
    architecture = replace(
        ARCHITECTURE,
        text=text,
        vision=vision,
        image_pad=ids.image_pad,
        video_pad=ids.video_pad,
        vision_start=ids.vision_start,
    )
    control = {"bos_token_id": ids.pad, "pad_token_id": ids.pad, "eos_token_id": ids.end}
    (blank / "config.json").write_text(json.dumps({**architecture.to_hf(), **control}))
    model = create(architecture, PolicyConfig(), 0)
    embedding = np.random.default_rng(0).normal(size=(text.vocab, text.hidden)).astype(np.float32)
    encode = Chat(blank, VideoConfig()).tokenizer.encode
    head = np.zeros((text.hidden, text.vocab), np.float32)
    for before, after in CHAIN.items():
        for following in after:
            head[:, encode(following)[0]] += CONVICTION / text.hidden * embedding[encode(before)[-1]]
    model.text.embedding.set_value(embedding)
    model.text.lm_head.kernel.set_value(head)
    hf.save(model, folder, like=blank)


def world(folder: Path) -> Config:
    """The settings of a run from a model that is written to `folder`."""
    write_model(folder / "model")
    return Config(
        policy=PolicyConfig(path=str(folder / "model"), remat="none"),
        video=VideoConfig(frames=FRAMES),
        data=DataConfig(labels=len(NAMES), tokens=(32, 48, 96), patches=(32,), threads=1),
        sft=SftConfig(steps=0),
        grpo=GrpoConfig(steps=6, prompts=8, group=2, accumulate=2, learning_rate=1e-3, warmup=1, save_every=2, temperature=1.0),
        rollout=RolloutConfig(mode="segmented", max_new_tokens=(10,), turn_tokens=80),
        tools=ToolsConfig("annotations"),
    )


def reinforce(config: Config, run_dir: Path, tools: Tools = annotations) -> GrpoRun:
    """GRPO as `config` says."""
    mesh = make_mesh(config.mesh)
    chat = Chat(config.policy.path, config.video)
    return train_grpo(load_policy(config, mesh), FewClips(config, chat), chat, tools, config, mesh, run_dir)


def main() -> None:
    config = load(Path(sys.argv[1]))
    reinforce(config, Path(config.run_dir))


if __name__ == "__main__":
    run_script(main)
