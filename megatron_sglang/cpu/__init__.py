"""The CPU room: what lets Megatron and SGLang run where there is no CUDA.

Nothing here is imported on a machine with CUDA. The trainer enters with `cpu.trainer.enter()` before it imports
Megatron; the engine's server process has its own, smaller set (`cpu.sglang_*`). The two never mix: a patch that
one of them needs can silently corrupt what the other computes.
"""
