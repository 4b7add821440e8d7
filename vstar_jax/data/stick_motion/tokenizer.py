"""StickMotion's tokenizer: byte-level BPE in which a word or a sub-motion is a token and every invented name is two.

It is trained on single words, the syllables most often and no name among them, so that a name always falls into its two
syllables and a model can only copy it, never know it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vstar_jax.data.stick_motion.motions import SUB_MOTIONS
from vstar_jax.data.stick_motion.names import SYLLABLES

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "answer", "pose_estimation", "person_detection", "video_explanation", "noun_explanation")
    for slash in ("", "/")
)
TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{%- if part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PIECES = rf" ?(?:{'|'.join(SUB_MOTIONS)})| ?\[[0-9]\]| ?[0-9]\.[0-9]| ?[a-zA-Z]+| ?[0-9]| ?[^a-zA-Z0-9\s]+|\s+"
"""What a token may span: a sub-motion, a section's heading such as [1], a score, a word, a digit, punctuation, blanks.

A sub-motion is one token, as frequent phrases are in large vocabularies of this kind: were it three, looking an action up by
its moves took a model of this size many times the steps (tried).
"""
MOST_MERGES = 4000


@dataclass(frozen=True)
class TokenIds:
    """What a config.json needs to know of a tokenizer."""

    size: int
    image_pad: int
    video_pad: int
    vision_start: int
    pad: int
    end: int


def build(directory: str | Path, words: Iterable[str]) -> TokenIds:
    """Writes the tokenizer of `words` (with their leading blanks and punctuation, as texts hold them) to `directory`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_MERGES,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(words), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    vocabulary: dict[str, int] = fast.get_vocab()
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>", "<|im_end|>")
    return TokenIds(len(fast), *(vocabulary[token] for token in special))


def _corpus(words: Iterable[str]) -> Iterator[str]:
    for syllable in SYLLABLES:
        yield from [syllable] * 2000
        yield from [f" {syllable}"] * 1000
    for word in sorted(set(words)):
        yield from [word] * 20
