"""Validation: the mean loss per token of a fixed held-out stream, the same number on any number of ranks.

Every rank reads the same stream, one lane in the order of the files, and takes its rows of each batch. All ranks so see
its end together, and neither training's stream nor its random state is touched.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from flame.config.schema import Data, DataLoader, JobConfig
from flame.data.loader import Loader
from flame.data.source import Source
from flame.data.tokenize import Tokenizer
from flame.errors import UserError
from flame.runtime.device import upload
from flame.training.context import RunContext
from flame.training.metrics import Metrics
from flame.training.pipeline import Pipeline, ScaledLoss

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class Validator(BaseValidator):
    """torchtitan's hook, called every validation.freq steps. torchtitan's own Validator averages batches, not tokens.

    After `sources`, the held-out ones, the arguments are torchtitan's. Raises UserError if the sources fill no row.
    """

    def __init__(
        self,
        context: RunContext,
        sources: Sequence[Source],
        *,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Tokenizer,
        parallel_dims: ParallelDims,
        loss_fn: ScaledLoss,
        validation_context: Callable[[], AbstractContextManager],
        metrics_processor: Metrics,
        pp_schedule: Any = None,
        pp_has_first_stage: Any = None,
        pp_has_last_stage: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(job_config)
        self._context, self._metrics, self._dims = context, metrics_processor, parallel_dims
        self._rank, self._dp_degree, self._train_context = dp_rank, dp_world_size, validation_context
        self._pipeline = Pipeline(pp_schedule, pp_has_first_stage, pp_has_last_stage, loss_fn) if pp_schedule else None
        training, validation = job_config.training, job_config.validation
        by_row = replace(
            training, dataloader=DataLoader(num_workers=validation.dataloader.num_workers, prefetch_factor=64)
        )
        by_row.local_batch_size, by_row.global_batch_size, by_row.seq_len = 1, 1, validation.seq_len
        once = Data(lanes=1, window=1, epochs=1)
        self._loader = Loader(sources, tokenizer, by_row, once, seed=0, dp_rank=0, dp_degree=1)
        self._start = self._loader.position()
        with closing(self._rows()) as rows:
            if next(rows, None) is None:
                found = f"less than one row in {validation.dataset}"
                allowed = f"at least validation.seq_len {validation.seq_len} tokens and one more"
                raise UserError("--validation.dataset", found, allowed)

    @torch.no_grad()
    def validate(self, model_parts: list[torch.nn.Module], step: int) -> None:
        """Log "validation/loss", the sum of all tokens' losses over their number."""
        begin = time.perf_counter()
        for part in model_parts:
            part.eval()
        total = torch.zeros(2, dtype=torch.float64, device=utils.device_type)  # losses, tokens
        with closing(self._batches()) as batches:
            for inputs, labels in batches:
                self._context.raise_if_stopped()
                moved = {name: upload(tensor, total.device) for name, tensor in inputs.items()}
                tokens, targets = moved.pop("input"), upload(labels, total.device)
                with self._train_context():
                    if self._pipeline is not None:
                        total[0] += self._pipeline.sum_losses(tokens, targets, moved.get("positions"))
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
        """This rank's batches, as many and as large as every other rank's: rows without labels fill up the last."""
        size = self.job_config.validation.local_batch_size
        with closing(self._rows()) as rows:
            while chunk := list(islice(rows, size * self._dp_degree)):
                inputs, labels = chunk[0]
                blank = (inputs, torch.full_like(labels, IGNORE_INDEX))
                mine = chunk[self._rank :: self._dp_degree]
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
