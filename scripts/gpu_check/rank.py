"""A rank whose Triton kernels take their first configuration: tuning takes minutes, and changes no value.

On the rehearsal's GPU it is the rank of a job whose steps are all good.
"""

import os
import sys
from typing import Any


def stubbed() -> bool:
    """Whether this process has the rehearsal's GPU."""
    return "libcudart_stub" in os.environ.get("LD_PRELOAD", "")


def use_first_configuration() -> None:
    """Have each autotuner take the first of its configurations."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def first(self: Any, *args: Any, **options: Any) -> Any:
        return prune(self, *args, **options)[:1]

    Autotuner.prune_configs = first  # type: ignore[method-assign]


def enter_rehearsal() -> None:
    from scripts.rehearsal import device

    stub = device.enter(world=1, compile_kernels=False, packed="--training.varlen" in sys.argv)
    device.expect_good_steps()
    from flame.training.trainer import FlameTrainer

    init = FlameTrainer.__init__

    def build(*args: Any) -> None:
        with stub.reading(False):  # no weight is NaN
            init(*args)

    FlameTrainer.__init__ = build  # type: ignore[method-assign]


if __name__ == "__main__":
    enter_rehearsal() if stubbed() else use_first_configuration()
    from flame.train import main

    sys.exit(main(sys.argv[1:]))
