"""Tiny tokenizers on disk: a byte-level one, through which any text goes unchanged, and one in SentencePiece's way."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TRAINING_TEXT = [
    "Question: Which of these? A. one B. two C. three D. four Answer: A",
    "The answer is 12. The following are multiple choice questions (with answers) about common sense.",
    "Please solve the following problem. Target: yes no Input: < { } > Output: ( [ ] ) 0 1 2 3 4 5 6 7 8 9",
]
_SCRATCH = tempfile.TemporaryDirectory(prefix="flexeval-test-")


@cache
def tokenizer_dir(*, adds_bos: bool = False) -> Path:
    """A byte-level tokenizer with end-of-text and BOS tokens; any text goes through it unchanged."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eos>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TRAINING_TEXT * 20, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = Path(_SCRATCH.name) / f"tokenizer-{adds_bos}"
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<s>").save_pretrained(folder)
    return folder


@cache
def sentencepiece_dir() -> Path:
    """Llama 2's way: spaces are `\u2581`, what has no piece is bytes `<0xNN>`, and a text's first space is stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdeé.\n"]
    merges = [("\u2581", "a"), ("b", "c"), ("\u2581a", "bc")]
    vocab = {piece: token for token, piece in enumerate([*pieces, *(left + right for left, right in merges)])}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    folder = Path(_SCRATCH.name) / "sentencepiece"
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return folder
