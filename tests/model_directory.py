"""A model directory as far as the data side reads it: config.json, a small byte-level tokenizer and a ChatML template."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(7)
TOKENS_PER_SECOND = 2
CORPUS = ["user assistant system", "what does the person do", "the person will wave and jump", "you answer in short"] * 4
SYSTEM = "You answer in short."
TEMPLATE = """\
{% for turn in messages %}{% if loop.first and turn.role != 'system' %}<|im_start|>system
You answer in short.<|im_end|>
{% endif %}<|im_start|>{{ turn.role }}
{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}\
{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write(directory: Path, template: str = TEMPLATE) -> Path:
    """Fills `directory` and returns it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    config = {
        "model_type": "qwen2_5_vl",
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_config": {"tokens_per_second": TOKENS_PER_SECOND},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, ENDOFTEXT]}))
    return directory
