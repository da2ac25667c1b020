"""The tiny task's tokenizer: byte-level BPE trained on its corpus, saved as a Hugging Face tokenizer.

At most 512 tokens: five special ones (<|endoftext|> is 0 and ends an answer), the 256 bytes, and merges. Digits stand
alone, blanks and words are separate chunks, so that a hole after a blank begins at a token's edge.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from problems import corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
END, PAD = "<|endoftext|>", "<|fim_pad|>"
SPECIAL = [END, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", PAD]
_CHUNK = r"\d|[A-Za-z_]+| +|\n *|[^\sA-Za-z0-9_]"


def train(seed: int, drafts: int = 6000) -> PreTrainedTokenizerFast:
    """Train on the right answers of `drafts` training drafts; the same seed gives the same tokenizer."""
    return train_on(draft.prefix + draft.meaning.gold + draft.after for draft in itertools.islice(corpus(seed), drafts))


def train_on(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CHUNK), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL[1:4],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
