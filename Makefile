# `make demo` on a bare machine: sets up, then trains a tiny MoE on two CPU ranks until it passes more held-out problems.
.PHONY: demo test install lint docs clean
PYTHONS := megatron_sglang pretrain_gspo.py scripts tests benchmarks

demo: install
	OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 pretrain_gspo.py \
	  --rollout-engine sglang --config conf/tiny_cpu.yaml $(ARGS)

test: install
	.venv/bin/python $(if $(ARGS),-m pytest $(ARGS),scripts/run_tests.py)

install:
	@scripts/setup

lint: install
	.venv/bin/ruff format --check $(wildcard $(PYTHONS))
	.venv/bin/ruff check $(wildcard $(PYTHONS))
	.venv/bin/pyright

docs: install
	.venv/bin/python scripts/document_options.py

clean:
	rm -rf .venv .venv-uv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
