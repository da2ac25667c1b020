"""What may stand in a request: pydantic models of OpenAI's fields and of our extensions.

Unknown fields are ignored, since official clients send new ones all the time. Those that would change what is sampled,
or make the engine load or run something, are refused by name (`REFUSED`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_sglang.stops import UNKNOWN
from megatron_sglang.types import SamplingParams

SEED = 2**63
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
DEEPEST = 64
_NO_GRAMMAR = "the engine has no grammar backend"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "custom_logit_processor": ((), "it is code"),
    "custom_params": ((), "they are for a custom_logit_processor"),
    "lora_path": ((), "the engine loads nothing on request"),
    "adapter": ((), "the engine loads nothing on request"),
    "model_path": ((), "the engine loads nothing on request"),
    "image_data": ((), "this endpoint takes text"),
    "video_data": ((), "this endpoint takes text"),
    "audio_data": ((), "this endpoint takes text"),
    "input_embeds": ((), "give text or token ids"),
    "audio": ((), "this endpoint gives text"),
    "modalities": ((["text"],), "this endpoint gives text"),
    "chat_template": ((), "it is the model folder's"),
    "bootstrap_host": ((), "it is the engine's own affair"),
    "bootstrap_port": ((), "it is the engine's own affair"),
    "return_hidden_states": ((False,), "they stay in the engine"),
    "response_format": (({"type": "text"},), _NO_GRAMMAR),
    "regex": ((), _NO_GRAMMAR),
    "ebnf": ((), _NO_GRAMMAR),
    "json_schema": ((), _NO_GRAMMAR),
    "structural_tag": ((), _NO_GRAMMAR),
    "guided_json": ((), _NO_GRAMMAR),
    "guided_regex": ((), _NO_GRAMMAR),
    "guided_choice": ((), _NO_GRAMMAR),
    "guided_grammar": ((), _NO_GRAMMAR),
    "logit_bias": (({},), "logprobs would not be those of the policy"),
    "presence_penalty": ((0,), "logprobs would not be those of the policy"),
    "frequency_penalty": ((0,), "logprobs would not be those of the policy"),
    "repetition_penalty": ((1,), "logprobs would not be those of the policy"),
    "echo": ((False,), "prompts come back as token ids with return_token_ids"),
    "suffix": (("",), "write the model's own infilling tokens into the prompt"),
    "best_of": ((1,), "ask for n choices and choose"),
    "ignore_eos": ((False,), "use min_tokens"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tools"),
    "use_beam_search": ((False,), "it is not sampling"),
}
"""Field -> its harmless values besides null, and why others are refused."""


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = False
    """A last chunk says how many tokens there were."""


class Options(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: Annotated[str, StringConstraints(max_length=512)] | None = None
    """Name of the served model; may be left out."""
    n: int | None = Field(1, ge=1, le=4096)
    temperature: float | None = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-SEED, lt=SEED)
    """Of the first choice; those of the others follow from it."""
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Ignored."""
    top_k: int | None = Field(-1, ge=-1, le=2**31 - 1)
    """Extension; -1: all tokens."""
    min_p: float | None = Field(0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """Extension."""
    min_tokens: int | None = Field(0, ge=0)
    """Extension: no stop before so many tokens."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=1024)
    """Extension."""
    session_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    """Extension: requests of one session go to the same engine, which has their common prefix in its cache."""
    return_token_ids: bool | None = False
    """Extension: token ids of prompt and choices, and the weight version of each sampled token."""

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for name in (one for one in given if one in REFUSED):
                harmless, why = REFUSED[name]
                if given[name] is not None and given[name] not in harmless:
                    raise _error_of(name, f"not supported: {why}", given[name])
        return given

    @field_validator("stop")
    @classmethod
    def _stop(cls, given: str | list[str] | None) -> str | list[str] | None:
        texts = [given] if isinstance(given, str) else given or []
        if len(texts) > MAX_STOPS:
            raise ValueError(f"{len(texts)} stop texts, at most {MAX_STOPS} are allowed")
        for text in texts:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS or UNKNOWN in text or not _encodes(text):
                raise ValueError(f"a stop text has 1 to {MAX_STOP_CHARACTERS} characters of Unicode without U+FFFD")
        return given

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_new_tokens: int, top_logprobs: int) -> SamplingParams:
        """Without a seed: those differ by choice."""
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=self.top_k or -1,
            min_p=_or(self.min_p, 0.0),
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop=self.stops,
            top_logprobs=top_logprobs,
        )


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Options):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0)
    """How many of the likeliest tokens to show at each position, besides the sampled one."""


class ContentPart(BaseModel):
    """A part of a message. Only texts are taken."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("type"), str) and given["type"] != "text":
            told = f"content of type {given['type'][:40]!r} is not supported; this endpoint takes text"
            raise _error_of("type", told, given["type"])
        return given


class FunctionCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """What an assistant called, in a message of the past."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Extension that templates of reasoning models know."""

    def for_template(self) -> dict[str, Any]:
        """What chat templates expect: text as one piece, the arguments of calls as values, no nulls."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        message.setdefault("content", "")
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = _json_or_text(call["function"]["arguments"])
        return message


class Function(BaseModel):
    """A tool's declaration; other fields of it go to the template too."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_too_deep(cls, given: Any) -> Any:
        if _is_deeper(given, DEEPEST):
            raise ValueError(f"a function is nested more than {DEEPEST} deep")
        return given


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: Function


class ChatRequest(Options):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=65536)
    max_tokens: int | None = Field(None, ge=1)
    """Default: what the context leaves, at most the endpoint's own limit."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name; wins."""
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Tool] | None = Field(None, max_length=1024)
    tool_choice: Literal["none", "auto"] | None = None
    """auto: the template gets the tools, and the answer comes as the model wrote it."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(None, max_length=32)
    """Extension: variables of the model's own template, such as enable_thinking."""
    add_generation_prompt: bool | None = True
    """Extension."""

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _error_of("top_logprobs", "it needs logprobs: true", self.top_logprobs)
        return self

    def template_options(self) -> dict[str, Any]:
        """Variables of the template. ValueError for those that are transformers' own."""
        given = dict(self.chat_template_kwargs or {})
        if own := given.keys() & _TEMPLATE_OWN:
            raise ValueError(f"chat_template_kwargs must not set {', '.join(sorted(own))}")
        return given | {"add_generation_prompt": self.add_generation_prompt is not False}


_TEMPLATE_OWN = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
}


def _or[T](given: T | None, default: T) -> T:
    return default if given is None else given


def _error_of(field: str, message: str, value: Any) -> ValidationError:
    """What a validator of a whole record says of one field; a ValueError would be about the record."""
    kind = PydanticCustomError("value_error", "{told}", {"told": message})
    return ValidationError.from_exception_data(field, [{"type": kind, "loc": (field,), "input": value}])


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_or_text(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if _is_deeper(found, DEEPEST) else found


def _is_deeper(given: Any, most: int) -> bool:
    """Whether lists and mappings are nested more than `most` deep. Templates and printing recurse and would fail."""
    level = [given]
    for _ in range(most + 1):
        level = [
            inner
            for one in level
            if isinstance(one, list | dict)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)
