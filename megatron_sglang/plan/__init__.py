"""`megatron-sglang plan`: what a weight update will move, and how long it should take, on any machine."""
