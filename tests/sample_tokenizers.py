"""Small tokenizers of the kinds that decoder-only models have, made by the `tokenizers` library itself."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog. ", "def main() -> int:\n    return 0\n", "Über naïve café, 日本語 🙂"] * 5
LLAMA2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    made.add_tokens(["<tool call>"])
    made.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", made.token_to_id("<|begin|>"))])
    return made


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = [text.encode("ascii", "ignore").decode() for text in CORPUS]
    made.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + BYTES, show_progress=False))
    fields = json.loads(made.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] not in BYTES]
    made = tokenizers.Tokenizer.from_str(json.dumps(fields))
    made.decoder = decoders.Sequence(LLAMA2)
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return made


def metaspace() -> tokenizers.Tokenizer:
    """As T5 and older conversions have it."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made
