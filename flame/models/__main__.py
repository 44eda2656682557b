"""`flame.sh models list|audit`: which models there are, and whether one is what its config means; see docs/."""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from flame.config.arguments import Parser
from flame.config.hub import check_available
from flame.errors import REFUSED, UserError
from flame.runtime import device


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with code 2 if it is wrong."""
    parser = Parser(prog="flame models", description="List model configs, or check one.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the configs of configs/, or those given, with their sizes")
    listing.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.json")
    listing.add_argument("--seq_len", type=int, default=2048, help="row length that FLOPs are counted at")
    audit = commands.add_parser("audit", help="check flame's model against transformers', from init to gradients")
    audit.add_argument("config", help="as --model.config")
    audit.add_argument("--depth", type=int, help="only this many blocks (two at least)")
    audit.add_argument("--width", type=int, help="with this hidden size, and all else as small")
    audit.add_argument("--seq_len", type=int, default=128)
    audit.add_argument("--seed", type=int, default=0)
    audit.add_argument("--import", dest="module", help="as --model.import")
    audit.add_argument("--trust_remote_code", action="store_true", help="as --model.trust_remote_code")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit code: 0 success, 1 a failed check, 2 a UserError, printed as one line."""
    given = parse(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("fla").setLevel(logging.ERROR)
    device.choose()  # before the imports below, which import torchtitan, which reads the device
    try:
        return _list(given) if given.command == "list" else _audit(given)
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED


def _list(given: Any) -> int:
    from flame.models.listing import CONFIGS, table

    _check_numbers(given, seq_len=1)
    for path in given.configs:
        if not path.is_file():
            raise UserError("list", f"no file {path}", "a model's JSON file")
    print(table(given.configs or sorted(CONFIGS.glob("*.json")), given.seq_len))
    return 0


def _check_numbers(given: Any, **least: int) -> None:
    for name, low in least.items():
        if (value := getattr(given, name)) is not None and not low <= value < 2**31:
            raise UserError(f"--{name}", value, f"{low} or more, and below 2^31")


def _audit(given: Any) -> int:
    _check_numbers(given, depth=2, width=16, seq_len=8, seed=0)
    check_available("audit", given.config, "model")
    from flame.models.audit import audit
    from flame.models.hf import build_on_meta, import_models, load_hf_config, read_config
    from flame.models.shrink import shrink

    if given.module:
        import_models(given.module)
    family, config = load_hf_config(given.config, trust_remote_code=given.trust_remote_code)
    if given.depth or given.width:
        fields = shrink(config.to_dict(), config, given.depth, given.width)
        family, config = read_config(fields, given.config, given.trust_remote_code)
    hf = build_on_meta(config, given.config, given.trust_remote_code)
    count = sum(parameter.numel() for parameter in hf.parameters())
    # in float32: flame's model, transformers' with the same weights, one with its own, and two sets of gradients
    if 5 * 4 * count > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        found = f"{count:,} parameters in {given.config}"
        raise UserError(
            "audit", found, f"at most {memory // 20:,} on this machine", "--depth and --width make it small"
        )
    ok = True
    for result in audit(family, config, given.seq_len, given.seed):
        print(f"{'ok  ' if result.ok else 'FAIL'}  {result.name:<14}  {result.figure}", flush=True)
        ok = ok and result.ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
