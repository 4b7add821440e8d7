"""The reference: a tiny Qwen2.5-VL of Hugging Face with random weights in float32, and dialogues as its inputs."""

from collections.abc import Sequence
from typing import Any

import dialogues as d
import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vstar_jax.models.vision import CLIP_MEAN, CLIP_STD


def torch_model(*, tie: bool, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights in which norms and biases count too, so that a forgotten one shows."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=d.VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=tie,
        ),
        vision_config=dict(
            depth=4,
            hidden_size=64,
            intermediate_size=80,
            num_heads=4,
            out_hidden_size=64,
            fullatt_block_indexes=[1, 3],
            tokens_per_second=d.TOKENS_PER_SECOND,
        ),
        image_token_id=d.IMAGE_PAD,
        video_token_id=d.VIDEO_PAD,
        vision_start_token_id=d.VISION_START,
        vision_end_token_id=d.VISION_END,
        tie_word_embeddings=tie,
        attn_implementation="eager",
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / np.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.3 * noise)
    return model


def pixel_values(clips: Sequence[d.Clip]) -> torch.Tensor:
    """Normalised rows float32 [P, 1176], in the processor's order."""
    patches = np.concatenate([c.patches for c in clips]).reshape(-1, 3, 392) / 255.0
    rows = (patches - np.reshape(CLIP_MEAN, (3, 1))) / np.reshape(CLIP_STD, (3, 1))
    return torch.from_numpy(rows.reshape(len(rows), -1).astype(np.float32))


def torch_inputs(rows: Sequence[d.Dialogue]) -> dict[str, Any]:
    """A batch padded on the right, with explicit positions, since transformers 5 computes other ones."""
    length = max(len(row.example.tokens) for row in rows)

    def padded(field: str) -> torch.Tensor:
        arrays = [getattr(row.example, field) for row in rows]
        return torch.from_numpy(
            np.stack([np.pad(a, [(0, length - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays]).astype(np.int64)
        )

    tokens = padded("tokens")
    inputs: dict[str, Any] = dict(
        input_ids=tokens,
        attention_mask=torch.tensor([[i < len(row.example.tokens) for i in range(length)] for row in rows]).long(),
        position_ids=padded("positions").permute(2, 0, 1),
    )
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        clips = [c for row in rows for c in row.clips if c.kind == kind]
        if clips:
            inputs[pixels] = pixel_values(clips)
            inputs[f"{kind}_grid_thw"] = torch.tensor([c.grid for c in clips])
    return inputs
