"""NaN and infinity: found on every rank and named before they reach a weight or a checkpoint."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torchtitan.tools.logging import logger

from flame.config.schema import Training
from flame.errors import NonFiniteError
from flame.models.parameters import local_tensor, strip_wrappers
from flame.runtime.consensus import RankConsensus

Named = Iterable[tuple[str, torch.Tensor]]  # tensors of this rank: its shard of each, without the others'
SHOWN = 3  # names of bad tensors in a report


@torch.no_grad()  # DTensor.to_local() then costs nothing
def name_gradients(parts: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The gradients of model parts, by the names of their parameters."""
    for name, parameter in _name_parameters(parts):
        if parameter.grad is not None:
            yield name, local_tensor(parameter.grad)


@torch.no_grad()
def name_state(
    parts: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of model parts and what their optimizers keep of them, such as "exp_avg of model.norm.weight"."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in _name_parameters(parts)}
    for weight, name in names.items():
        yield name, local_tensor(weight)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for kind, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():  # not the count of steps
                    yield f"{kind} of {names[parameter]}", local_tensor(value)


class SkippedSteps:
    """The steps whose update is skipped, and how many of them --training.skip_nan_inf allows in a row."""

    def __init__(self, training: Training, *, updates_in_backward: bool) -> None:
        self._training, self._updates_in_backward = training, updates_in_backward
        self.total = self.in_a_row = 0

    def skip(self, step: int, bad: str, parts: Iterable[nn.Module], data: str) -> None:
        """Count a step in which `bad` is not finite; data: how to show what it was fed.

        Raises NonFiniteError if it may not be skipped. All ranks call it alike.
        """
        training, when = self._training, "before the update"
        self.in_a_row += 1
        if self._updates_in_backward:
            when, policy = "after the update", "--optimizer.early_step_in_backward updates before it can be known"
        elif not training.skip_nan_inf:
            policy = "--training.skip_nan_inf skips such steps"
        elif self.in_a_row > training.max_skipped_steps:
            policy = (
                f"as were the {training.max_skipped_steps} steps before, --training.max_skipped_steps allows no more"
            )
        else:
            self.total += 1
            reset_expert_counts(parts)
            logger.warning(f"step {step}: not finite: {bad}; the update is skipped ({self.total} so far)")
            return
        raise NonFiniteError(
            f"step {step}: not finite: {bad}; stopped {when}, and nothing was saved ({policy}); {data}"
        )


def reset_expert_counts(parts: Iterable[nn.Module]) -> None:
    """Forget the tokens that torchtitan's routers counted in a skipped step; an update would have reset them."""
    for name, buffer in (pair for part in parts for pair in part.named_buffers()):
        if name.endswith("tokens_per_expert"):
            buffer.zero_()


def find(tensors: Named) -> list[str]:
    """The names of those that hold NaN or infinity. Waits for a GPU once if none does."""
    filled = {name: tensor for name, tensor in tensors if tensor.numel()}
    # The norm costs no more than reading them. Large finite numbers can make it infinite too, hence the second look.
    if nn.utils.get_total_norm(filled.values()).isfinite():
        return []
    return [name for name, tensor in filled.items() if not tensor.isfinite().all()]


def describe_step(loss: torch.Tensor, parts: Iterable[nn.Module], consensus: RankConsensus) -> str:
    """What of a step is not finite, on any rank. All ranks call it. loss: this rank's part."""
    names = find(name_gradients(parts))
    bad_loss, bad_gradient = consensus.max(not loss.isfinite(), bool(names))
    found = ["the loss"] if bad_loss else []
    found += [_describe(names, consensus, "gradient")] if bad_gradient else []
    return " and ".join(found) or "the norm of finite gradients"


def find_bad_state(
    parts: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer], consensus: RankConsensus
) -> str:
    """What of the weights and optimizers is not finite on any rank, "" if all is. All ranks call it."""
    names = find(name_state(parts, optimizers))
    (bad,) = consensus.max(bool(names))
    return _describe(names, consensus, "tensor") if bad else ""


def _describe(bad: list[str], consensus: RankConsensus, kind: str) -> str:
    """Such as "2 gradients (model.norm.weight, ...; on rank 1)", of all ranks."""
    found = consensus.gather(bad)
    names = list(dict.fromkeys(name for of_rank in found for name in of_rank))
    where = [str(rank) for rank, of_rank in enumerate(found) if of_rank]
    many, ranks = "s" * (len(names) > 1), "s" * (len(where) > 1)
    return f"{len(names)} {kind}{many} ({_shorten(names)}; on rank{ranks} {_shorten(where)})"


def _shorten(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])


def _name_parameters(parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for part in parts:
        for name, parameter in part.named_parameters():
            yield strip_wrappers(name), parameter
