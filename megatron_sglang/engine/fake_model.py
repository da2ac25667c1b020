"""What the fake engine has in place of a model: parameters that our loader fills, and tokens that follow from them."""

from __future__ import annotations

import array
import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sglang.hf_files import count_experts
from megatron_sglang.peft_names import WEIGHTS

if TYPE_CHECKING:
    import torch


class Parameters:
    """The least that `loader.load` asks of a model: any name is a parameter of that name."""

    def __init__(self, folder: str | None = None) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}
        """By name, what a PEFT folder held when it was loaded."""
        self.salt = ""
        """Changes with the weights, and the tokens with it."""
        for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
            self.tensors |= _read(path)

    def load_adapter(self, name: str, folder: str) -> None:
        path = Path(folder, WEIGHTS)
        self.adapters[name] = _read(path) if path.exists() else {}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.tensors.update((name, tensor.clone()) for name, tensor in weights)

    def digests(self) -> dict[str, int]:
        from megatron_sglang.digests import digest

        return {name: digest(tensor) for name, tensor in self.tensors.items()}

    def renew_salt(self) -> None:
        self.salt = hashlib.sha256(repr(sorted(self.digests().items())).encode()).hexdigest()


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


class Sampler:
    """The tokens of one completion, one after the other: a function of weights, adapter, seed and all tokens before, so
    that a completion can be cut and continued, as with SGLang's seeds."""

    def __init__(self, vocab_size: int, salt: str, body: dict[str, Any]) -> None:
        sampling = body["sampling_params"]
        seed = sampling["sampling_seed"] if sampling["temperature"] > 0 else None
        self._vocab_size = vocab_size
        self._forbidden = {int(token) for token, bias in (sampling.get("logit_bias") or {}).items() if bias < -1e6}
        self._top = body.get("top_logprobs_num") or 0
        self._state = hashlib.sha256(f"{salt} {body.get('lora_path')} {seed}".encode()).digest()
        self.ids: list[int] = []
        """Prompt and what was drawn."""
        for token in body["input_ids"]:
            self._advance(token)

    def draw(self) -> tuple[list[Any], list[list[Any]]]:
        """[logprob, token, null] of the next token, and of the likeliest ones."""
        drawn = self._state
        while (token := int.from_bytes(drawn[:8]) % self._vocab_size) in self._forbidden:
            drawn = hashlib.sha256(drawn).digest()
        logprob = -1.0 - drawn[8] / 256
        self._advance(token)
        top = [[logprob - rank, (token + rank) % self._vocab_size, None] for rank in range(self._top)]
        return [logprob, token, None], top

    def _advance(self, token: int) -> None:
        self.ids.append(token)
        self._state = hashlib.sha256(self._state + token.to_bytes(4)).digest()


def singles(body: dict[str, Any]) -> list[dict[str, Any]]:
    """A call for several completions as a body for each."""
    listed = ("input_ids", "sampling_params", "top_logprobs_num", "lora_path")
    common = {key: body[key] for key in ("return_routed_experts", "routed_experts_start_len") if key in body}
    return [
        common | {key: body[key][number] for key in listed if body.get(key)} for number in range(len(body["input_ids"]))
    ]


def routed_experts(model: str, ids: Iterable[int], start: int) -> str:
    """What SGLang tells of all `ids` but the last, from `start` on, for the model whose config.json is in that folder:
    top_k experts in a row, the first by token, place and layer."""
    config = json.loads(Path(model, "config.json").read_text())
    layers, top_k, count = config["num_hidden_layers"], config["num_experts_per_tok"], count_experts(config)
    found = array.array("i")
    for place, token in list(enumerate(ids))[start:-1]:
        found.extend((token + place + layer + slot) % count for layer in range(layers) for slot in range(top_k))
    return base64.b64encode(found.tobytes()).decode()


def grouped(events: Iterable[dict[str, Any]], every: int | None) -> Iterator[dict[str, Any]]:
    """Events of several tokens, as SGLang sends them: of the first, of `every` more, and of the rest; None: of all."""
    ids: list[int] = []
    rows: dict[str, list[Any]] = {"output_token_logprobs": [], "output_top_logprobs": []}
    for event in events:
        meta = event["meta_info"]
        ids += event["output_ids"]
        for key, values in rows.items():
            values += meta[key]
        if meta["finish_reason"] or (every and meta["completion_tokens"] % every == 1 % every):
            yield {"output_ids": list(ids), "meta_info": meta | {key: list(values) for key, values in rows.items()}}
            ids.clear()
            for values in rows.values():
                values.clear()
