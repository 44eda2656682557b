"""A rank of a drill: flame.train with a trainer of flame.drills.fault. Started by flame.drills.job."""

import os
import sys
from pathlib import Path

from flame.train import main

if __name__ == "__main__":
    pids, fault, *argv = sys.argv[1:]
    Path(pids, str(os.getpid())).touch()
    sys.exit(main(argv, f"flame.drills.fault:{fault}"))
