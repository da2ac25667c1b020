"""Which tokens end a completion."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sglang.training.run import stop_tokens


def test_all_that_sglang_stops_at_are_known(tmp_path: Path) -> None:
    """Qwen3 ends a message with one token and a text with another; left in a completion of code it is a SyntaxError.
    The tokenizer's own comes first: it ends turns that the engine has cut."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 45}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [45, 43]}))
    assert stop_tokens(45, str(tmp_path)) == (45, 43)
    assert stop_tokens(44, str(tmp_path)) == (44, 43, 45)
