"""The trainer's weights under their Hugging Face names: for the engine (export), and for folders (convert)."""

from megatron_sglang.weights.convert import export_adapter, export_merged, import_adapter

__all__ = ["export_adapter", "export_merged", "import_adapter"]
