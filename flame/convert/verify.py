"""Verifies that an export is the model that was trained: its tensors by its config, its logits by training's,
its ids by its tokenizer.json."""

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from flame.checkpoint.structure import ConversionError, TensorSpecs, check_structure
from flame.convert.export import export_checkpoint
from flame.convert.hf_structure import read_structure, read_trained_structure
from flame.convert.hf_weights import specs_of
from flame.convert.safetensors_file import find_files, read_headers
from flame.convert.tokenizer import compare_tokenizer
from flame.errors import UserError

LOGITS_BYTES = 3 << 29  # in float32; the logits of larger models are not compared, as it takes memory of that size
TOLERANCE = 1e-4  # of the largest logit; usually the difference is 0
ROWS, LENGTH = 2, 96  # of the tokens that both models are run on
HOLDS = "the tensors have the names, shapes and types of the config's model"


def export_and_verify(checkpoint: Path, assets: Path, folder: Path, dtype: str | None = None) -> bool:
    """`export_checkpoint` with `verify_export`; `assets` is the folder in which the run recorded its model."""
    try:
        published_as = read_trained_structure(assets).published_as
    except UserError:  # `verify_export` reports it
        published_as = {}
    verify = partial(verify_export, checkpoint, dtype)
    return export_checkpoint(checkpoint, assets, folder, dtype, published_as=published_as, verify=verify)


def verify_export(checkpoint: Path, dtype: str | None, folder: Path) -> dict[str, Any]:
    """Check an export made from `checkpoint` with a cast to `dtype`; returns the results for its report.

    What cannot be checked is reported and is not a failure. Raises ConversionError.
    """
    tensors = specs_of(read_headers(find_files(folder)))
    try:
        check_structure(tensors, read_structure(folder).published)
    except UserError as error:
        return {"structure": f"not checked: {error}", "logits": "not compared", "tokenizer": compare_tokenizer(folder)}
    logits = too_large(tensors) or check_logits(checkpoint, dtype, folder)
    return {"structure": HOLDS, "logits": logits, "tokenizer": compare_tokenizer(folder)}


def too_large(tensors: TensorSpecs) -> str | None:
    """Why the logits of a model with these tensors are not compared, if they are not."""
    nbytes = sum(prod(shape) for _, shape in tensors.values()) * 4
    if nbytes <= LOGITS_BYTES:
        return None
    return f"not compared: {nbytes >> 20} MiB in float32, of at most {LOGITS_BYTES >> 20}"


def check_logits(checkpoint: Path, dtype: str | None, folder: Path) -> dict[str, float] | str:
    """`compare_logits`, or why a model's cannot be compared. Raises ConversionError."""
    try:
        return compare_logits(checkpoint, dtype, folder)
    except UserError as error:
        return f"not compared: {error}"


def compare_logits(checkpoint: Path, dtype: str | None, folder: Path) -> dict[str, float]:
    """The training forward of a DCP checkpoint against `from_pretrained` of its export, in float32 on the CPU.

    The first has the checkpoint's weights as a resume loads them, rounded to `dtype` as the export's are;
    `change_by_the_cast` is what that rounding alone does. Both are fed the same fixed tokens. Raises ConversionError if
    the logits differ or the export does not load, and UserError for a model that does not run on a CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from flame.checkpoint.reader import load
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
        load(model.state_dict(), checkpoint, no_dist=True)
        model.eval()
        expected = trained = model(tokens)
        if rounded:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, str(dtype))))
            expected = model(tokens)
        del model
        disable_progress_bar()  # transformers', which would show one for a second at the end of a run
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        exported, info = loaded
        if wrong := [f"{kind}: {keys}" for kind, keys in info.items() if keys]:
            raise ConversionError(f"{folder} does not load without changes: {'; '.join(wrong)}")
        logits = exported.eval()(tokens, use_cache=False).logits
    largest, difference = expected.abs().max().item(), (logits - expected).abs().max().item()
    found = {"tokens": tokens.numel(), "largest": largest, "max_abs_difference": difference}
    if not difference <= TOLERANCE * largest:  # nor if it is NaN
        raise ConversionError(f"{folder}: its logits differ from the training forward's by {difference} of {largest}")
    if rounded:
        found["change_by_the_cast"] = (expected - trained).abs().max().item()
    return found
