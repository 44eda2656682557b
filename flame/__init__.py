"""flame: a thin recipe layer that trains language models on torchtitan. Importing it has no side effect."""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and not find_spec("torchtitan"):  # `python -m flame.data ...`, by a Python of another place
    from pathlib import Path
    from shlex import join

    module, *words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    script, part = "scripts/flame.sh", module.split(".")[1:]
    if part == ["config", "commands"]:  # as flame.sh starts it
        part = []
    elif part not in (["data"], ["models"], ["drills"]):
        script, part = "train.sh", []
    command = join(["bash", str(Path(__file__).parents[1] / script), *part, *words])
    print(f"flame: {sys.executable} has no torchtitan; with the Python that has it: {command}", file=sys.stderr)
    sys.exit(2)
