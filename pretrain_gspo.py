"""Train a LoRA-adapted model with GSPO: Megatron's own loop, an SGLang engine on the same devices for the rollouts.

    two CPU cores   torchrun --nproc-per-node 2 pretrain_gspo.py --rollout-engine sglang --config conf/tiny_cpu.yaml
    eight GPUs      torchrun --nproc-per-node 8 pretrain_gspo.py --rollout-engine sglang --config FILE \\
                        --tensor-model-parallel-size 2 --expert-model-parallel-size 4

Options: docs/configuration.md for ours (YAML, `section.field=value`, flags); Megatron's flags are Megatron's;
`--sglang-*` goes to SGLang. `--dry-run` prints what would run, and stops. Exit code 1 after an error, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_sglang.training import ending


def main() -> int:
    """The exit code of this rank: that of `train`, or 128 + the number of the signal that stopped it."""
    ending.watch()  # first, because the imports of `train` take half a minute, and a signal may come meanwhile
    try:
        return train(sys.argv[1:])
    except ending.Stopped as stopped:
        return ending.report_stop(stopped)


def train(argv: list[str]) -> int:
    """Run the command line as one of torchrun's ranks; the exit code.

    What is heavy is imported inside: `host.prepare` must come before torch, and a dry run needs no Megatron.
    """
    from megatron_sglang import host

    changed = host.prepare(os.environ)  # torch reads the variables when it is imported

    from megatron_sglang import config_load, dry_run
    from megatron_sglang.errors import MegatronSglangError

    try:
        invocation = config_load.split_argv(argv)
        if invocation.dry_run:
            warn(invocation.warnings)
            if is_leader():
                print(dry_run.describe(invocation.config))
            return 0
        warn([*changed, *invocation.warnings, *host.check(invocation.config, os.environ)])
        host.share_nccl(invocation.config, os.environ)
    except MegatronSglangError as error:  # the same on all ranks
        return ending.report(error, log=None, shared=not is_leader())

    from megatron_sglang.training import run

    try:
        run.train(invocation.config)
    except Exception as error:  # noqa: BLE001 - the edge of the process
        return ending.report(error, run.log_file(invocation.config))
    return 0


def warn(warnings: Sequence[str]) -> None:
    if is_leader():
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)


def is_leader() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


if __name__ == "__main__":
    sys.exit(main())
