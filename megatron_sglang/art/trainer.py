"""One of torchrun's ranks of a backend's run: `python -m megatron_sglang.art.trainer --config FILE`.

What `pretrain_gspo.py` does for a command line, from the installed package.
"""

from __future__ import annotations

import sys

from megatron_sglang.training import ending


def main() -> int:
    """The exit code: 1 after an error, 128 + signal after a signal."""
    ending.watch()
    try:
        from megatron_sglang import config_load
        from megatron_sglang.training import run

        config = config_load.split_argv(sys.argv[1:]).config
        try:
            run.train(config)
        except Exception as error:  # noqa: BLE001 - the edge of the process
            return ending.report(error, run.log_file(config))
    except ending.Stopped as stopped:
        return ending.report_stop(stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
