"""One run of a rehearsal, in a process of its own: python run.py '{"run": "flame", ...}', started by rehearse.py.

Runs: "flame", its trainer on the job; "torchtitan" and "torchtitan, compiled", torchtitan's Trainer on its llama3 of
the same shape; "bare", a loop of model, loss, backward, clipping and AdamW around transformers' or fla's model.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from scripts.rehearsal import device  # noqa: E402
from scripts.rehearsal.count import LAST, LOG_EVERY, Meter  # noqa: E402

# Makes the meter of a loop, from what sets the microbatches of its steps and how many they are.
MakeMeter = Callable[[Callable[[int], None], int], Any]
Building = Callable[[], contextlib.AbstractContextManager]  # what a loop's model is built in


@dataclass
class Spec:
    """What to run; see rehearse.py's flags."""

    run: str
    config: str
    flags: list[str]
    world: int
    depth: int | None
    compile_kernels: bool
    result: str


def main(spec: Spec) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(spec.world)}
    os.environ |= {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29999", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    stub = device.enter(spec.world, spec.compile_kernels, packed="--training.varlen" in spec.flags)
    from flame.runtime import log

    log.configure()
    device.expect_good_steps()
    run = {"flame": run_flame, "bare": run_bare}.get(spec.run, run_torchtitan)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        job = make_job(spec, Path(folder))
        result = run(spec, job, partial(Meter, stub), partial(stub.reading, False))  # no weight is NaN
    Path(spec.result).write_text(json.dumps(result))


def make_job(spec: Spec, folder: Path) -> Any:
    """flame's config of the job, of a model with `depth` blocks."""
    from flame.config.parser import parse
    from flame.models.hf import read_config, read_fields
    from flame.models.shrink import shrink

    fields = read_fields(spec.config)
    if spec.depth is not None:
        fields = shrink(fields, read_config(fields, spec.config)[1], depth=spec.depth)
    (folder / "model.json").write_text(json.dumps(fields))
    own = {
        "model.config": folder / "model.json", "job.dump_folder": folder / "run", "training.steps": LAST,
        "training.seq_len": 2048, "training.local_batch_size": 8, "metrics.log_freq": LOG_EVERY,
    }  # fmt: skip
    return parse([*(f"--{name}={value}" for name, value in own.items()), "--checkpoint.no_enable", *spec.flags])


def _measure_steps(trainer: Any, make_meter: MakeMeter) -> Any:
    """Have a meter run each step of a trainer."""
    meter = make_meter(
        lambda n: setattr(trainer, "gradient_accumulation_steps", n), trainer.gradient_accumulation_steps
    )
    meter.watch(trainer.model_parts)
    step = trainer.train_step
    trainer.train_step = lambda data: meter.step(trainer.step, lambda: step(data))
    return meter


def run_flame(spec: Spec, job: Any, make_meter: MakeMeter, building: Building) -> dict[str, Any]:
    from flame.config.parser import world_size
    from flame.preflight.validate import check
    from flame.training.context import RunContext
    from flame.training.train_spec import register
    from flame.training.trainer import FlameTrainer

    context = RunContext(job)
    check(job, world_size())
    register(job, context)
    if job.parallelism.pipeline_parallel_degree > 1:
        _describe_stages(job)
    with building():
        trainer = FlameTrainer(job, context)
    meter = _measure_steps(trainer, make_meter)
    trainer.train()
    trainer.close()
    tokens = job.training.local_batch_size * job.training.seq_len * trainer.gradient_accumulation_steps
    shared = trainer.parallel_dims.non_data_parallel_size  # ranks that share these tokens
    names = ("torch", "triton", "torchtitan", "transformers", "flash-linear-attention")
    return meter.result() | {
        "tokens": tokens / shared,
        "flops_per_token": trainer.metrics_processor.num_flops_per_token,
        "parameters": sum(p.numel() for part in trainer.model_parts for p in part.parameters()),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _describe_stages(job: Any) -> None:
    from torchtitan.config import TORCH_DTYPE_MAP

    from flame.models.hf import read_config, read_fields

    config = read_config(read_fields(job.model.config), job.model.config)[1]
    dtype = TORCH_DTYPE_MAP[job.training.mixed_precision_param]
    rows = job.parallelism.pipeline_parallel_microbatch_size
    device.describe_stages(rows, job.training.seq_len, config.hidden_size, dtype)


def run_torchtitan(spec: Spec, job: Any, make_meter: MakeMeter, building: Building) -> dict[str, Any]:
    from torchtitan.config import ConfigManager
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
    from torchtitan.train import Trainer

    training = job.training
    theirs = replace(
        get_train_spec("llama3"),
        model_args={"shape": _llama_args(job.model.config)},
        build_dataloader_fn=lambda **_: make_rows(training),
        build_tokenizer_fn=None,
        state_dict_adapter=None,
    )
    register_train_spec("rehearsed", theirs)
    own = {
        "model.name": "rehearsed", "model.flavor": "shape", "job.dump_folder": job.job.dump_folder,
        "training.steps": training.steps, "metrics.log_freq": LOG_EVERY, "training.seq_len": training.seq_len,
        "training.local_batch_size": training.local_batch_size,
        "training.global_batch_size": training.global_batch_size,
        "activation_checkpoint.mode": job.activation_checkpoint.mode,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in own.items()]
    compiled = ["--compile.enable"] if spec.run.endswith("compiled") else []
    with building():
        trainer = Trainer(ConfigManager().parse_args([*flags, *compiled]))
    meter = _measure_steps(trainer, make_meter)
    trainer.train()
    return meter.result()


def _llama_args(config: str) -> Any:
    """torchtitan's arguments of a Llama; its head is never tied to the embedding."""
    from torchtitan.models.llama3 import TransformerModelArgs

    fields = json.loads(Path(config).read_text())
    if fields["model_type"] != "llama":
        sys.exit(f"--peer: torchtitan's llama3 has the shape of a llama, found {fields['model_type']}")
    return TransformerModelArgs(
        dim=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=fields["num_attention_heads"],
        n_kv_heads=fields.get("num_key_value_heads"),
        vocab_size=fields["vocab_size"],
        multiple_of=fields["intermediate_size"],  # rounds two thirds of 4 x dim up to it
        norm_eps=fields["rms_norm_eps"],
    )


def make_rows(training: Any) -> Any:
    """A data loader of torchtitan's kind, of one batch again and again."""
    import torch
    from torchtitan.components.dataloader import BaseDataLoader

    tokens = torch.randint(256, (training.local_batch_size, training.seq_len + 1))

    class Rows(BaseDataLoader):
        def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
            while True:
                yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    return Rows()


def run_bare(spec: Spec, job: Any, make_meter: MakeMeter, building: Building) -> dict[str, Any]:
    """FSDP2 in bfloat16 on several ranks, autocast on one."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torchtitan.tools.utils import device_type

    from flame.models.hf import build_hf, build_on_meta, read_config, read_fields
    from flame.runtime.device import upload

    family, config = read_config(read_fields(job.model.config), job.model.config)
    amp: Any = contextlib.nullcontext()
    if spec.world > 1:
        model = build_on_meta(config, job.model.config)
        dist.init_process_group("nccl")
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for module in (*getattr(model.base_model, family.blocks), model):
            fully_shard(module, mp_policy=policy)
        model.to_empty(device=device_type)
    else:
        amp = torch.autocast(device_type, torch.bfloat16)
        with torch.device(device_type), building():
            model = build_hf(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    microbatches, where = 1, torch.device(device_type)

    def set_microbatches(number: int) -> None:
        nonlocal microbatches
        microbatches = number

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(microbatches):
            inputs, labels = next(batches)
            tokens, labels = (upload(x, where) for x in (inputs["input"], labels))
            with amp:
                logits = model(input_ids=tokens, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) / microbatches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number % LOG_EVERY == 0:
            print(loss.item())

    batches, meter = iter(make_rows(job.training)), make_meter(set_microbatches, microbatches)
    meter.watch([model])
    for number in range(1, job.training.steps + 1):
        meter.step(number, step)
    return meter.result()


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
