"""Proof that an export is the model that was trained: its tensors against its config, its logits against training's.

`python -m flame.convert.verify structure|logits` does the same in a process of its own, for the conversion script,
which loads neither torch nor a model.
"""

import argparse
import json
import logging
import sys
import warnings
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from flame.checkpoint.structure import ConversionError, TensorSpecs, check_structure, save_structure
from flame.convert.export import export_checkpoint
from flame.convert.hf_structure import read_structure, read_trained
from flame.convert.safetensors_file import find_files, read_headers
from flame.errors import UserError

LOGITS_BYTES = 3 << 29  # in float32; of larger models the logits are not compared, as it takes memory of that size
TOLERANCE = 1e-4  # of the largest logit; what is found is 0, or nearly
ROWS, LENGTH = 2, 96  # of the tokens that both are run on
HOLDS = "the tensors have the names, shapes and types of the config's model"


def export_proven(checkpoint: Path, assets: Path, folder: Path, dtype: str | None = None) -> bool:
    """`export_checkpoint` with `prove`, in this process."""
    try:
        save_structure(structure := read_trained(assets), assets)
        parts = structure.published_as
    except UserError:  # `prove` says so in the report
        parts = {}
    return export_checkpoint(checkpoint, assets, folder, dtype, parts=parts, prove=partial(prove, checkpoint, dtype))


def prove(checkpoint: Path, dtype: str | None, folder: Path) -> dict[str, Any]:
    """Check an export made from `checkpoint` with a cast to `dtype`; returns what was found.

    What cannot be checked, such as a model that needs a GPU to run, is said and is no failure. Raises ConversionError.
    """
    found = _found(folder)
    try:
        check_structure(found, read_structure(folder).published)
    except UserError as error:
        return {"structure": f"not checked: {error}", "logits": "not compared"}
    try:
        logits = too_large(found) or compare_logits(checkpoint, dtype, folder)
    except UserError as error:
        logits = f"not compared: {error}"
    return {"structure": HOLDS, "logits": logits}


def too_large(found: TensorSpecs) -> str | None:
    """Why the logits of a model with these tensors are not compared, if they are not."""
    nbytes = sum(prod(shape) for _, shape in found.values()) * 4
    if nbytes <= LOGITS_BYTES:
        return None
    return f"not compared: {nbytes >> 20} MiB in float32, of at most {LOGITS_BYTES >> 20}"


def compare_logits(checkpoint: Path, dtype: str | None, folder: Path) -> dict[str, float]:
    """The training forward of a DCP checkpoint against `from_pretrained` of its export, in float32 on the CPU.

    The first has the checkpoint's weights as torch's own reader loads them, rounded to `dtype` as the export's are;
    `change_by_the_cast` is what that rounding alone does. Both are fed the same fixed tokens. Raises ConversionError,
    and UserError for a model that does not run on a CPU.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from flame.models import reference
    from flame.models.causal_lm import CausalLM, ModelArgs
    from flame.models.hf import read_config, read_fields
    from flame.titan import hf_equivalent
    from flame.titan import model as titan_model

    family, config = read_config(read_fields(str(folder / "config.json")), str(folder))
    if family.from_fla:
        reference.check_supported(config.model_type)
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    tokens = (torch.arange(ROWS * length) * 7919 % config.vocab_size).view(ROWS, length)

    recorded = hf_equivalent.read_recorded_model(folder)
    rounded = dtype not in (None, "float32")
    with torch.no_grad():
        with torch.device("meta"):
            model: Any = titan_model.build(*recorded) if recorded else CausalLM(ModelArgs().bind(family, config))
        model.to_empty(device="cpu")
        model.init_weights()  # for the buffers that no checkpoint has
        dcp.load(model.state_dict(), checkpoint_id=str(checkpoint), no_dist=True)
        model.eval()
        expected = trained = model(tokens)
        if rounded:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, str(dtype))))
            expected = model(tokens)
        del model
        disable_progress_bar()  # transformers': one of a second at the end of a run
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        exported, info = loaded
        if wrong := [f"{kind}: {keys}" for kind, keys in info.items() if keys]:
            raise ConversionError(f"{folder} does not load as it is: {'; '.join(wrong)}")
        logits = exported.eval()(tokens, use_cache=False).logits
    largest, difference = expected.abs().max().item(), (logits - expected).abs().max().item()
    found = {"tokens": tokens.numel(), "largest": largest, "max_abs_difference": difference}
    if not difference <= TOLERANCE * largest:  # nor if it is NaN
        raise ConversionError(f"{folder}: its logits differ from the training forward's by {difference} of {largest}")
    if rounded:
        found["change_by_the_cast"] = (expected - trained).abs().max().item()
    return found


def _found(folder: Path) -> TensorSpecs:
    return {name: (entry.dtype, entry.shape) for name, entry in read_headers(find_files(folder)).items()}


def _write_assets(config: str, tokenizer: str, folder: Path) -> None:
    from flame.data.tokenize import build_tokenizer
    from flame.models.hf import build_on_meta, load_hf_config, save_assets

    built = build_tokenizer(tokenizer)
    _, hf_config = load_hf_config(config, tokenizer=built, grow_vocab=True)
    save_assets(folder, build_on_meta(hf_config, config), built.hf)


def main(argv: list[str]) -> int:
    """Exit code: 0 fine, 1 a check failed, 2 a mistake of the user; either is said on stderr."""
    parser = argparse.ArgumentParser(prog="python -m flame.convert.verify")
    parser.add_argument("--import", dest="module", default="", help="as --model.import")
    commands = parser.add_subparsers(dest="command", required=True)
    structure = commands.add_parser("structure", help="keep what tensors a folder's config.json means in the folder")
    structure.add_argument("folder", type=Path)
    structure.add_argument("--config", help="write config.json and the tokenizer to the folder first, from this config")
    structure.add_argument("--tokenizer", help="and this tokenizer")
    logits = commands.add_parser("logits", help="an export's logits against those of its checkpoint")
    logits.add_argument("checkpoint", type=Path)
    logits.add_argument("folder", type=Path)
    logits.add_argument("--dtype", help="that the export was cast to")
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from flame.runtime import device

    device.choose()  # before the import of torchtitan, which reads the device
    from flame.models.hf import import_models

    try:
        if given.module:
            import_models(given.module)
        if given.command == "logits":
            print(json.dumps(compare_logits(given.checkpoint, given.dtype, given.folder)))
        else:
            if given.config:
                _write_assets(given.config, given.tokenizer, given.folder)
            save_structure(read_trained(given.folder), given.folder)
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 2
    except ConversionError as error:
        print(f"flame: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
