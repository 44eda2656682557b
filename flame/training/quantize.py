"""What torchtitan's float8 and MX converters need of the machine, the job and the model, validated before a launch."""

import importlib.util

from torchtitan.tools.utils import has_cuda_capability, has_rocm_capability
from transformers import PreTrainedModel

from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.models.family import Family

FLAG, GATHER = "--model.converters", "--quantize.linear.float8.enable_fsdp_float8_all_gather"


def check(job_config: JobConfig) -> None:
    """Raises UserError for model.converters that this machine cannot train with, or that find nothing to convert.

    torchtitan rejects most of it too, with a traceback and after the process group is made.
    """
    converters = job_config.model.converters
    if not converters:
        return
    found, float8 = ",".join(converters), job_config.quantize.linear.float8
    if len({name.rpartition(".")[2] for name in converters}) > 1:
        raise UserError(FLAG, found, "all float8 or all mx")
    grouped = [name for name in converters if name.startswith("quantize.grouped_mm")]
    if job_config.model.name == "auto" and grouped:
        raise UserError(FLAG, found, f"without {grouped[0]}", "models of transformers have no grouped experts")
    if "quantize.linear.float8" in converters:
        if float8.recipe_name and float8.enable_fsdp_float8_all_gather:
            raise UserError(GATHER, "true", f"false with --quantize.linear.float8.recipe_name {float8.recipe_name}")
        if not has_cuda_capability(8, 9) and (job_config.compile.enable or not float8.emulate):
            hint = "needs a GPU of compute capability 8.9 or higher (H100, L40, RTX 40), or "
            raise UserError(FLAG, found, hint=f"{hint}--quantize.linear.float8.emulate without --compile.enable")
    if "quantize.linear.mx" in converters and not (has_cuda_capability(10, 0) or has_rocm_capability(9, 5)):
        raise UserError(FLAG, found, hint="needs a GPU of compute capability 10.0 or higher (B200), or gfx950")
    if importlib.util.find_spec("torchao") is None:
        raise UserError(FLAG, found, hint="needs the package torchao: pip install 'flame[float8]'")


def adapt(job_config: JobConfig, family: Family, model: PreTrainedModel) -> None:
    """Exclude the model's head, which computes the loss in chunks. Raises UserError for a family without float8."""
    linear, converters = job_config.quantize.linear, job_config.model.converters
    if converters and family.float8 is not True:
        raise UserError(FLAG, ",".join(converters), f"none for {model.config.model_type}", str(family.float8))
    if converters and family.from_fla and linear.float8.enable_fsdp_float8_all_gather:
        raise UserError(GATHER, "true", "false for fla's models", "their kernels take weights as they are")
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    for kind in (linear.float8, linear.mx):
        if name not in kind.filter_fqns:
            kind.filter_fqns.append(name)
