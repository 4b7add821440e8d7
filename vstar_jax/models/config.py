"""The architecture of Qwen2.5-VL as frozen dataclasses: presets and the reading of a Hugging Face config.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vstar_jax.errors import UserError


@dataclass(frozen=True)
class TextArchitecture:
    """The language model: D `hidden`, L `layers`, N `heads`, K `kv_heads`, `head_dim` each, V `vocab`."""

    vocab: int = 151936
    hidden: int = 2048
    intermediate: int = 11008
    layers: int = 36
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    initializer_range: float = 0.02


@dataclass(frozen=True)
class VisionArchitecture:
    """The vision tower; patch 14, temporal patch 2, 2 x 2 merge and windows of 112 pixels are the data side's constants."""

    hidden: int = 1280
    intermediate: int = 3420
    layers: int = 32
    heads: int = 16
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden: int = 2048
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Architecture:
    """Qwen2.5-VL, and the token ids and the time unit that its positions need."""

    text: TextArchitecture = field(default_factory=TextArchitecture)
    vision: VisionArchitecture = field(default_factory=VisionArchitecture)
    image_pad: int = 151655
    video_pad: int = 151656
    vision_start: int = 151652
    tokens_per_second: int = 2

    @classmethod
    def preset(cls, name: str) -> "Architecture":
        """A size by name: tiny is StickMotion's base model, small and medium are for benchmarks, 3b and 7b were released."""
        presets = {"tiny": TINY, "small": SMALL, "medium": MEDIUM, "3b": cls(), "7b": SEVEN_B}
        if name not in presets:
            raise UserError(f"there is no model preset {name!r}: choose one of {', '.join(presets)}.")
        return presets[name]

    @classmethod
    def from_hf(cls, path: str | Path) -> "Architecture":
        """Reads config.json, flat as released with the weights or nested under text_config as newer transformers write it.

        Raises UserError when the file is missing, is no Qwen2.5-VL, or describes something that this model is not.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} has no config.json: give a model directory in Hugging Face format.")
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{file} is not valid JSON ({error}): copy the file of the model again.") from error
        if raw.get("model_type") != "qwen2_5_vl":
            raise UserError(f"{file} is of model_type {raw.get('model_type')!r}: only qwen2_5_vl can be loaded.")
        try:
            return cls._from_raw(raw, file)
        except KeyError as error:
            raise UserError(f"{file} lacks the key {error}: copy the file of the model again.") from error

    @classmethod
    def _from_raw(cls, raw: dict[str, Any], file: Path) -> "Architecture":
        text, vision = {**raw, **raw.get("text_config", {})}, raw["vision_config"]
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        fixed = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112}
        for key, value in fixed.items():
            if vision.get(key, value) != value:
                raise UserError(f"{file} has vision_config.{key} = {vision[key]}: only {value} is supported.")
        if text.get("use_sliding_window"):
            raise UserError(f"{file} asks for sliding-window attention, which no released Qwen2.5-VL uses: set it to false.")
        return cls(
            text=TextArchitecture(
                vocab=text["vocab_size"],
                hidden=text["hidden_size"],
                intermediate=text["intermediate_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
                mrope_section=tuple(rope["mrope_section"]),
                norm_eps=text["rms_norm_eps"],
                initializer_range=text.get("initializer_range", 0.02),
                tie_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            ),
            vision=VisionArchitecture(
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                layers=vision["depth"],
                heads=vision["num_heads"],
                full_attention_layers=tuple(vision["fullatt_block_indexes"]),
                out_hidden=vision["out_hidden_size"],
            ),
            image_pad=raw["image_token_id"],
            video_pad=raw["video_token_id"],
            vision_start=raw.get("vision_start_token_id", 151652),
            tokens_per_second=vision.get("tokens_per_second", 4),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json, in the flat layout of the released checkpoints."""
        text, vision = self.text, self.vision
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "vocab_size": text.vocab,
            "hidden_size": text.hidden,
            "intermediate_size": text.intermediate,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 128000,
            "rms_norm_eps": text.norm_eps,
            "initializer_range": text.initializer_range,
            "rope_theta": text.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
            "use_sliding_window": False,
            "tie_word_embeddings": text.tie_embeddings,
            "image_token_id": self.image_pad,
            "video_token_id": self.video_pad,
            "vision_start_token_id": self.vision_start,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": vision.layers,
                "hidden_size": vision.hidden,
                "intermediate_size": vision.intermediate,
                "num_heads": vision.heads,
                "hidden_act": "silu",
                "in_channels": 3,
                "out_hidden_size": vision.out_hidden,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": list(vision.full_attention_layers),
                "tokens_per_second": self.tokens_per_second,
            },
        }


SEVEN_B = Architecture(
    text=TextArchitecture(vocab=152064, hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, tie_embeddings=False),
    vision=VisionArchitecture(out_hidden=3584),
)
TINY = Architecture(
    text=TextArchitecture(
        vocab=1024,
        hidden=128,
        intermediate=384,
        layers=3,
        heads=4,
        kv_heads=4,
        head_dim=32,
        rope_theta=1e4,
        mrope_section=(4, 6, 6),
        initializer_range=0.08,  # embeddings of 0.02 are lost in the direction in which rare tokens are pushed away
    ),
    vision=VisionArchitecture(hidden=128, intermediate=384, layers=3, heads=4, full_attention_layers=(2,), out_hidden=128),
    image_pad=5,
    video_pad=6,
    vision_start=3,
)


def _miniature(hidden: int, layers: int, vocab: int) -> Architecture:
    """The proportions of the 3B model at another width: heads of 64, twice as many as KV heads, windows but in one of three."""
    heads = hidden // 64
    return Architecture(
        text=TextArchitecture(
            vocab=vocab,
            hidden=hidden,
            intermediate=4 * hidden,
            layers=layers,
            heads=heads,
            kv_heads=heads // 2,
            head_dim=64,
            mrope_section=(8, 12, 12),
        ),
        vision=VisionArchitecture(
            hidden=hidden,
            intermediate=3 * hidden,
            layers=layers,
            heads=heads,
            full_attention_layers=tuple(range(2, layers, 3)),
            out_hidden=hidden,
        ),
        image_pad=5,
        video_pad=6,
        vision_start=3,
    )


SMALL = _miniature(hidden=256, layers=6, vocab=4096)
MEDIUM = _miniature(hidden=512, layers=6, vocab=4096)
