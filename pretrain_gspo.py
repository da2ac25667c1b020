"""Train a LoRA-adapted model with GSPO: Megatron's own loop, an SGLang engine on the same devices for the rollouts.

    two CPU cores   torchrun --nproc-per-node 2 pretrain_gspo.py --rollout-engine sglang --config conf/tiny_cpu.yaml
    eight GPUs      torchrun --nproc-per-node 8 pretrain_gspo.py --rollout-engine sglang --config FILE \\
                        --tensor-model-parallel-size 2 --expert-model-parallel-size 4

Options: docs/configuration.md for ours (YAML, `section.field=value`, flags); Megatron's flags are Megatron's;
`--sglang-*` goes to SGLang. `--dry-run` prints what would run, and stops.
"""

from __future__ import annotations

import os
import sys

from megatron_sglang import config_load, dry_run
from megatron_sglang.errors import MegatronSglangError


def main() -> int:
    is_leader = int(os.environ.get("RANK", "0")) == 0
    try:
        invocation = config_load.split_argv(sys.argv[1:])
        if is_leader:
            for warning in invocation.warnings:
                print(f"warning: {warning}", file=sys.stderr)
        if invocation.dry_run:
            if is_leader:
                print(dry_run.describe(invocation.config))
            return 0
        from megatron_sglang.training import run

        run.train(invocation.config)
    except MegatronSglangError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
