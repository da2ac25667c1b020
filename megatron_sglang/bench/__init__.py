"""Measurements that users can repeat: `megatron-sglang bench`."""
