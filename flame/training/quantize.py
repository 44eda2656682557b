"""What torchtitan's float8 and MX converters need of the machine, the job and the model, checked before a launch."""

import importlib.util
from typing import Any

from torchtitan.tools.utils import has_cuda_capability, has_rocm_capability
from transformers import PreTrainedModel

from flame.errors import UserError
from flame.models.family import Family


def check(job_config: Any) -> None:
    """Refuse model.converters that this machine cannot train with, or that find nothing to convert. Raises UserError.

    torchtitan says most of it too, with a traceback and after the process group is made.
    """
    converters = job_config.model.converters
    if not converters:
        return
    flag = f"--model.converters: found {','.join(converters)}"
    if len({name.rpartition(".")[2] for name in converters}) > 1:
        raise UserError(f"{flag}, must be all of float8 or all of mx")
    for name in converters:
        if job_config.model.name == "auto" and name.startswith("quantize.grouped_mm"):
            raise UserError(
                f"{flag}, but transformers' models have no grouped experts of torchtitan's; leave {name} out"
            )
    float8 = job_config.quantize.linear.float8
    if "quantize.linear.float8" in converters:
        if float8.recipe_name and float8.enable_fsdp_float8_all_gather:
            raise UserError(
                "--quantize.linear.float8.enable_fsdp_float8_all_gather: found true, must be false beside "
                f"--quantize.linear.float8.recipe_name {float8.recipe_name}"
            )
        if not has_cuda_capability(8, 9) and (job_config.compile.enable or not float8.emulate):
            raise UserError(
                f"{flag}, which needs a GPU of compute capability 8.9 (H100, L40, RTX 40) or more; elsewhere "
                "--quantize.linear.float8.emulate without --compile.enable"
            )
    if "quantize.linear.mx" in converters and not (has_cuda_capability(10, 0) or has_rocm_capability(9, 5)):
        raise UserError(f"{flag}, which needs a GPU of compute capability 10.0 (B200), or gfx950, or more")
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{flag}, which needs the package torchao: pip install 'flame[float8]'")


def adapt(job_config: Any, family: Family, model: PreTrainedModel) -> None:
    """Have the converters leave out the model's head, which computes the loss piece by piece. Raises UserError."""
    linear, converters = job_config.quantize.linear, job_config.model.converters
    if converters and family.float8 is not True:
        raise UserError(
            f"--model.converters: found {','.join(converters)}, must be none for {model.config.model_type}: "
            f"{family.float8}"
        )
    if converters and family.from_fla and linear.float8.enable_fsdp_float8_all_gather:
        raise UserError(
            "--quantize.linear.float8.enable_fsdp_float8_all_gather: found true, must be false for fla's models, whose "
            "kernels take weights as they are"
        )
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    for kind in (linear.float8, linear.mx):
        if name not in kind.filter_fqns:
            kind.filter_fqns.append(name)
