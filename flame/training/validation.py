"""Validation: the mean loss a token of a fixed held-out stream, the same number on any number of ranks.

Every rank reads the same stream, one lane in the order of the files, and takes its rows of each batch; so all of them
see its end together, and nothing of training's stream or random state is touched.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from flame.config.parser import JobConfig
from flame.data.loader import Loader
from flame.data.source import Source
from flame.data.tokenize import Tokenizer
from flame.errors import UserError
from flame.models.loss import SummedLoss
from flame.training.metrics import Metrics

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pipeline:
    """The schedule of a rank's stages, for batches of the shape that it trains on."""

    schedule: Any
    first: bool
    last: bool
    loss: SummedLoss

    def sum_losses(self, tokens: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """The sum of a batch's losses on the rank of the last stage, 0 on the others."""
        self.loss.scale = 1.0
        losses: list[torch.Tensor] | None = [] if self.last else None
        given = {"labels": labels} if positions is None else {"labels": labels, "positions": positions}
        target = labels if self.last else None
        self.schedule.eval(
            *([tokens] if self.first else []), target=target, losses=losses, return_outputs=False, **given
        )
        return torch.stack(losses).sum() if losses else torch.zeros((), device=labels.device)


class Validator(BaseValidator):
    """torchtitan's hook, called every validation.freq steps; its own Validator averages batches, not tokens.

    loader: batches of one row, all rows of the set. Raises UserError if there is not even one.
    """

    def __init__(
        self,
        job_config: JobConfig,
        loader: Loader,
        rank: int,
        ranks: int,
        *,
        dims: ParallelDims,
        pipeline: "Pipeline | None",
        context: Callable[[], AbstractContextManager],
        amp: AbstractContextManager,
        metrics: Metrics,
    ) -> None:
        super().__init__(job_config)
        self._loader, self._start, self._rank, self._ranks = loader, loader.position(), rank, ranks
        self._dims, self._pipeline, self._metrics = dims, pipeline, metrics
        self._context, self._amp = context, amp
        self.stop_if_asked: Callable[[], None] = lambda: None  # the trainer's
        with closing(self._rows()) as rows:
            if next(rows, None) is None:
                validation = job_config.validation
                raise UserError(
                    f"--validation.dataset: {validation.dataset} does not fill one row of validation.seq_len "
                    f"{validation.seq_len}"
                )

    @torch.no_grad()
    def validate(self, model_parts: list[torch.nn.Module], step: int) -> None:
        """Log "validation/loss", the sum of all tokens' losses over their number, of the model as it is."""
        begin = time.perf_counter()
        for part in model_parts:
            part.eval()
        total = torch.zeros(2, dtype=torch.float64, device=utils.device_type)  # losses, tokens
        with closing(self._batches()) as batches:
            for inputs, labels in batches:
                self.stop_if_asked()
                moved = {name: tensor.to(utils.device_type) for name, tensor in inputs.items()}
                tokens, targets = moved.pop("input"), labels.to(utils.device_type)
                with self._context(), self._amp:
                    if self._pipeline is not None:
                        total[0] += self._pipeline.sum_losses(tokens, moved.get("positions"), targets)
                    else:
                        total[0] += model_parts[0](tokens, **moved, labels=targets)
                total[1] += (targets != IGNORE_INDEX).sum()
        for part in model_parts:
            part.train()
        # Ranks that share a sequence all count its tokens, and each has a part of its loss.
        for figure, names in zip(total, (("loss", "pp"), ("batch",)), strict=True):
            for mesh in filter(None, map(self._dims.get_optional_mesh, names)):
                dist.all_reduce(figure, group=mesh.get_group())
        loss, count = total.tolist()
        seconds = time.perf_counter() - begin
        self._metrics.log_validation(
            loss / count, step, {"validation/tokens": round(count), "validation/seconds": seconds}
        )

    def _rows(self) -> Generator[Batch, None, None]:
        self._loader.rewind(self._start)
        validation = self.job_config.validation
        limit = None if validation.steps == -1 else validation.steps * validation.local_batch_size
        with closing(iter(self._loader)) as rows:
            yield from islice(rows, limit)

    def _batches(self) -> Generator[Batch, None, None]:
        """This rank's batches, as many and as large as every other rank's: rows of no label fill up the last."""
        size = self.job_config.validation.local_batch_size
        with closing(self._rows()) as rows:
            while chunk := list(islice(rows, size * self._ranks)):
                inputs, labels = chunk[0]
                blank = (inputs, torch.full_like(labels, IGNORE_INDEX))
                mine = chunk[self._rank :: self._ranks]
                yield _stack([*mine, *[blank] * (size - len(mine))])


def _stack(rows: list[Batch]) -> Batch:
    """One batch of batches of one row; cu_seqlens count on through the flattened batch."""
    first, labels = rows[0]
    inputs = {name: torch.cat([row[name] for row, _ in rows]) for name in first if name != "cu_seqlens"}
    if "cu_seqlens" in first:
        seq = labels.shape[1]
        begins = [row["cu_seqlens"][:-1] + i * seq for i, (row, _) in enumerate(rows)]
        end = torch.tensor([len(rows) * seq], dtype=first["cu_seqlens"].dtype)
        inputs["cu_seqlens"] = torch.cat([*begins, end])
    return inputs, torch.cat([labels for _, labels in rows])


def build_validator(
    *,
    sources: Sequence[Source],
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: Tokenizer,
    parallel_dims: ParallelDims,
    loss_fn: SummedLoss,
    validation_context: Callable[[], AbstractContextManager],
    maybe_enable_amp: AbstractContextManager,
    metrics_processor: Metrics,
    pp_schedule: Any = None,
    pp_has_first_stage: Any = None,
    pp_has_last_stage: Any = None,
    **_: Any,
) -> Validator:
    """torchtitan's `build_validator_fn` over the opened held-out sources. Raises UserError if they fill no row."""
    validation, training = job_config.validation, job_config.training
    loader = Loader(
        sources,
        tokenizer,
        rank=0,
        world=1,
        batch=1,
        seq_len=validation.seq_len,
        lanes=1,
        window=1,
        workers=validation.dataloader.num_workers,
        prefetch=64,
        varlen=training.varlen,
        context_len=training.context_len,
        epochs=1,
    )
    return Validator(
        job_config,
        loader,
        dp_rank,
        dp_world_size,
        dims=parallel_dims,
        pipeline=Pipeline(pp_schedule, pp_has_first_stage, pp_has_last_stage, loss_fn) if pp_schedule else None,
        context=validation_context,
        # as in flame.training.trainer: 0.2.2 asks autocast for float32, which CPU refuses
        amp=nullcontext() if training.mixed_precision_param == "float32" else maybe_enable_amp,
        metrics=metrics_processor,
    )
