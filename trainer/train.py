"""Trains a CLIP on shards.

    python -m trainer.train CONF.yaml [key=value ...]         start, or resume from the last checkpoint
    python -m trainer.train CONF.yaml --plan                  print steps, memory and GPU-hours, and stop
    torchrun --nproc-per-node 8 -m trainer.train CONF.yaml    train on 8 ranks, each with its part of every batch
    python -m trainer.train CONF.yaml ranks=8                 the same on Ray, alone or after `ray job submit --`

For example, plan a preset on your own data, then train on 100 million samples of it:

    python -m trainer.train conf/train_vit_b32.yaml shards='data/{00000..01242}.tar' output=runs/b32 --plan
    torchrun --nproc-per-node 8 -m trainer.train conf/train_vit_b32.yaml shards='data/{00000..01242}.tar' \\
        output=runs/b32 samples=100000000 micro_batch_size=1024

The output folder gets `checkpoints/step-*.pt`, `metrics.jsonl` (a line every `log_every` steps) and, at the end,
`model/`, which `open_clip.create_model_and_transforms("local-dir:OUTPUT/model")` loads. Samples that cannot be read are
named, counted and replaced by others. docs/training.md describes the rest.

The same configuration on the same shards gives the same weights, for any number of `workers` and however often the run
was killed and resumed: bit for bit on a CPU with the same number of threads and ranks. With another number of ranks,
each step uses the same samples and only the order in which floats are added differs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from trainer.config import describe, load_config
from trainer.errors import FailedError
from trainer.terminal import entry_point, interrupted


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description=__doc__,
        epilog="keys of the configuration:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("conf", help="a YAML file such as conf/train_demo.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="replaces a value of the file")
    parser.add_argument("--plan", action="store_true", help="print steps, FLOPs, memory and GPU-hours, and stop")
    parser.add_argument("--resume", metavar="latest", help="same as resume=latest, the default (or none, or a path)")
    args = parser.parse_args(argv)

    # Imported late: torch takes seconds, and --help does not need it.
    import torch

    from trainer import cost, distributed, loop
    from trainer.evaluation import parse
    from trainer.training import StoppedError

    try:
        config = load_config(args.conf, args.overrides + ([f"resume={args.resume}"] if args.resume else []))
        parse(config.evaluate)
        if args.plan:
            print(cost.estimate(config))
        elif config.ranks:
            distributed.on_ray(loop.train, config)
        else:
            loop.train(config)
    except torch.OutOfMemoryError as error:
        cure = "Set micro_batch_size (--plan says what fits) or grad_checkpointing=true, or train on more ranks."
        raise FailedError(f"{str(error).splitlines()[0]}\n  {cure}") from None
    except StoppedError:
        print("stopped by SIGTERM; the same command resumes from the checkpoint just written", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt as stop:
        print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return interrupted(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
