"""One batch through the pipeline stages of a rank, forward and backward or forward alone."""

from dataclasses import dataclass
from typing import Any

import torch


class ScaledLoss:
    """torchtitan's loss of a pipeline: what the head of the last stage returns, times `scale`."""

    scale: float | torch.Tensor = 1.0

    def __call__(self, loss: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
        return loss * self.scale


@dataclass(frozen=True)
class Pipeline:
    """The schedule of a rank's stages; first, last: whether the rank has the first and the last stage."""

    schedule: Any  # torch.distributed.pipelining's
    first: bool
    last: bool
    loss: ScaledLoss

    def sum_losses(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None,
        *,
        scale: float | torch.Tensor = 1.0,
        backward: bool = False,
    ) -> torch.Tensor:
        """`scale` x the sum of a batch's losses on the rank of the last stage, 0 on the others.

        tokens, labels, positions: (batch, seq). Every stage is given the labels, and the head of the last uses them;
        the schedule wants a target too, which holds nothing.
        """
        self.loss.scale = scale
        losses: list[torch.Tensor] | None = [] if self.last else None
        run = self.schedule.step if backward else self.schedule.eval
        run(
            *([tokens] if self.first else []),
            target=labels[:, :0] if self.last else None,
            losses=losses,
            return_outputs=False,
            labels=labels,
            **({} if positions is None else {"positions": positions}),
        )
        return torch.stack(losses).sum().to(labels.device) if losses else torch.zeros((), device=labels.device)
