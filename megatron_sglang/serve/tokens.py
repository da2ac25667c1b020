"""Text and token ids of one model, by its folder's tokenizer, in this process: SGLang sees ids only.

What is short is tokenized at once; what is long, in one thread beside the event loop, which must not stand still.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sglang.engine.controls import eos_token_ids
from megatron_sglang.errors import DataError
from megatron_sglang.serve.refusal import invalid

Json = Mapping[str, Any]
SHORT_TEXT = 8192
"""Characters that are tokenized without leaving the event loop: about a millisecond."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What an endpoint needs to know of a model."""

    folder: Path
    tokenizer: Any
    vocab_size: int
    """Ids that the model's embedding has; the tokenizer may have fewer."""
    context_length: int
    eos_token_ids: tuple[int, ...]
    byte_of: Mapping[str, int]
    """Of a byte-level tokenizer: character of a token -> byte. Empty for others."""
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Special tokens, which decoding leaves out, by their names."""
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    @staticmethod
    def load(folder: str | Path, context_length: int | None = None) -> Tokens:
        """From the folder's tokenizer and config.json; no code of it is run. DataError if something is missing.

        context_length: where it is less than the model's own.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            sizes = config.get("text_config", config)
            vocab_size, longest = int(sizes["vocab_size"]), int(sizes["max_position_embeddings"])
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            tokenizer.model_max_length = 1 << 62  # the length is checked here, and not by a warning in the log
            tokenizer.encode("")  # settles its truncation, which it could not do in two threads at once
            known = min(longest, context_length or longest)
            special = {str(one): number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
            eos = eos_token_ids(str(folder))
            return Tokens(folder, tokenizer, vocab_size, known, eos, _byte_of(tokenizer), special)
        except DataError:
            raise
        except Exception as error:  # a tokenizer's Rust side raises Exception itself
            raise DataError(
                f"{folder} cannot be served: {error!r}; expected a Hugging Face folder with config.json and a tokenizer"
            ) from error

    async def prompt(self, text: str) -> list[int]:
        """Token ids of `text`, with what the tokenizer puts around a text, such as BOS. Refusal 400 for text that is
        none (half a surrogate pair)."""
        return await self._off_loop(len(text), lambda: self._encode(text, "prompt", special=True))

    async def chat(self, messages: Sequence[Json], tools: Sequence[Json] | None, options: Json) -> list[int]:
        """Token ids of a conversation as the model's template writes it. Refusal 400 without a template, or where it
        does not take these messages."""
        if not self.tokenizer.chat_template:
            raise invalid(
                f"model {self.folder.name!r} has no chat template; use /v1/completions, or put a chat_template.jinja "
                "into its folder",
                "messages",
            )
        size = sum(len(str(message)) for message in messages) + len(str(tools or ""))
        return await self._off_loop(size, lambda: self._encode(self._written(messages, tools, options), "messages"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens, special tokens left out, nothing tidied up."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stops(self, texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop texts to be matched in the text, and token ids: those of special tokens, which `decode` leaves out, so
        that no text has them. Refusal 400 for a special token with something around it."""
        ids, others = [], []
        for text in texts:
            held = [name for name in self.special_ids if name in text]
            if text in self.special_ids:
                ids.append(self.special_ids[text])
            elif held:
                raise invalid(
                    f"stop text {text!r} cannot be found: special tokens such as {held[0]!r} are not in the text; make "
                    "the token a stop of its own",
                    "stop",
                )
            else:
                others.append(text)
        return tuple(others), tuple(ids)

    def name(self, token_id: int) -> tuple[str, list[int] | None]:
        """One token as logprobs show it: its text, or bytes:\\xe2 where it is a part of a character; and its bytes."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self.tokenizer) else None
        if piece is None:
            return f"<id {token_id}>", None
        if self.byte_of and all(character in self.byte_of for character in piece):
            raw = bytes(self.byte_of[character] for character in piece)
            try:
                return raw.decode(), list(raw)
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)
        text = self.tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text, list(text.encode(errors="replace"))

    async def _off_loop[T](self, size: int, work: Callable[[], T]) -> T:
        if size <= SHORT_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    def _encode(self, text: str, field: str, *, special: bool = False) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special))
        except (TypeError, ValueError, UnicodeError) as error:
            raise invalid("the text is not valid Unicode: it holds half of a surrogate pair", field) from error

    def _written(self, messages: Sequence[Json], tools: Sequence[Json] | None, options: Json) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, tokenize=False, **options
            )
        # What a template does with messages it was not written for.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise invalid(f"the model's chat template does not take these messages: {error}", "messages") from error
        except RecursionError as error:
            raise invalid("the messages are nested too deeply for the model's chat template", "messages") from error


@functools.cache
def _bytes_by_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_of(tokenizer: Any) -> Mapping[str, int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = {one.get("type") for one in (decoder, *decoder.get("decoders", ()))}
    return _bytes_by_character() if "ByteLevel" in kinds else {}
