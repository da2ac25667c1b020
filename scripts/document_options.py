#!/usr/bin/env python3
"""Write docs/configuration.md from the configuration's dataclasses; a test fails while it is not current."""

from pathlib import Path

from megatron_sglang.config_docs import markdown

if __name__ == "__main__":
    (Path(__file__).parent.parent / "docs" / "configuration.md").write_text(markdown())
