"""Megatron's own training loop with an SGLang hybrid engine inside it.

prompts -> rollout -> rewards -> advantages -> batches -> train step -> merged weights -> engine
"""

__version__ = "0.1.0"
