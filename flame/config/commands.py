"""`bash scripts/flame.sh COMMAND ...`, or `flame COMMAND ...` in an active environment: all but training."""

import runpy
import sys
from importlib import import_module
from pathlib import Path

from flame.errors import INTERRUPTED, REFUSED

COMMANDS = {
    "data": "show what a step was fed, compare the data of two runs, measure a stream, tokenize files",
    "models": "list model configs, or check one against transformers",
    "drills": "make a tiny job fail on purpose, and check that nothing is lost",
    "export": "convert a checkpoint to a Hugging Face folder",
    "import": "convert a Hugging Face folder to a checkpoint",
}
FOLDER = Path(__file__).parents[2] / "scripts"
SCRIPTS = {"export": "convert_dcp_to_hf.py", "import": "convert_hf_to_dcp.py"}  # the other commands are modules


def main() -> int:
    """Run the command that sys.argv names; its exit code, REFUSED for an unknown one, INTERRUPTED after Ctrl-C."""
    command, *words = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print("usage: flame COMMAND ..., and flame COMMAND -h\n")
        print("\n".join(f"  {name:<8}{text}" for name, text in COMMANDS.items()))
        return 0
    if command not in COMMANDS:
        print(f"flame: command: found {command or 'nothing'}, must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        return REFUSED
    try:
        if command in SCRIPTS:
            return runpy.run_path(str(FOLDER / SCRIPTS[command]))["main"](words)
        return import_module(f"flame.{command}.__main__").main(words)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
