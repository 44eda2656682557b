"""fla's kernels and packed documents in bfloat16 beside flame's references, model by model:

python -m scripts.gpu_check.kernels '{"check": "kernels" or "packed", "configs": [...], "result": FILE}'

Each line of the result is one model's. "error" is what went wrong.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from flame.runtime import device as flame_device  # noqa: E402
from scripts.gpu_check.rank import stubbed, use_first_configuration  # noqa: E402
from scripts.rehearsal import device as rehearsal_device  # noqa: E402

if stubbed():
    rehearsal_device.enter(1, compile_kernels=False, packed=True)
WHERE = flame_device.choose()

import torch  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from flame.models import reference  # noqa: E402
from flame.models.audit import perturb_weights  # noqa: E402
from flame.models.causal_lm import CausalLM, ModelArgs  # noqa: E402
from flame.models.hf import choose_attention  # noqa: E402
from flame.runtime.device import upload  # noqa: E402
from scripts.gpu_check.models import small  # noqa: E402

ROWS, LENGTH, CUT = 2, 192, 70  # CUT: where a row's second document begins


class Call(NamedTuple):
    """A call of an entry point of fla, with its arguments on the CPU."""

    entry: Callable
    reference: Callable
    args: tuple
    kwargs: dict[str, Any]


class Recorder:
    """Keeps the calls of flame's references while it records, one of each kind."""

    def __init__(self) -> None:
        self.calls: dict[Any, Call] | None = None
        for module in vars(reference).values():
            if hasattr(module, "pairs") and module is not reference.packing:  # which is on every device
                module.pairs = functools.partial(self._recorded, module.pairs)

    @contextmanager
    def recording(self) -> Iterator[dict[Any, Call]]:
        self.calls = {}
        yield self.calls
        self.calls = None

    def _recorded(self, pairs: Callable) -> list[tuple[Callable, Callable]]:
        return [(entry, self._record(entry, own)) for entry, own in pairs()]

    def _record(self, entry: Callable, own: Callable) -> Callable:
        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.calls is not None:
                kind = (entry, *(tuple(x.shape) if isinstance(x, torch.Tensor) else x is None for x in args))
                kept = tree_map(lambda x: keep(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
                self.calls.setdefault((*kind, *kwargs), Call(entry, own, *kept))
            return own(*args, **kwargs)

        return call


def keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def build(source: str, dtype: torch.dtype, where: str, packed: bool = False) -> CausalLM:
    """A small model as the trainer would build it, for packed documents or not, with perturbed weights in a type."""
    family, config = small(source)
    if where != "cpu":
        choose_attention(config, family, str(dtype).removeprefix("torch."), packed)
    model = CausalLM(ModelArgs(seed=0).bind(family, config))
    model.init_weights()
    perturb_weights(model, seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(where)


def batch(model: CausalLM) -> torch.Tensor:
    tokens = torch.randint(model.hf.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokens.to(model.embedding.weight.device)


def gradients(model: CausalLM) -> torch.Tensor:
    """All gradients of a model in float32 on the CPU, which are then forgotten."""
    found = torch.cat([p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def distance(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected; None is zeros."""
    found = torch.zeros_like(expected) if found is None else found
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# -- kernels -----------------------------------------------------------------------------------------------------------
def compare_kernels(source: str, recorder: Recorder) -> dict[str, Any]:
    """Loss and gradients of a model, and outputs and gradients of each kernel, against float32 on a CPU.

    cpu_*: of the references in bfloat16.
    """

    def train(dtype: torch.dtype, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = build(source, dtype, where)
        tokens = batch(model)
        loss = model(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())
        loss.backward()
        return loss, gradients(model)

    exact = train(torch.float32, "cpu")
    with recorder.recording() as calls:
        on_cpu = train(torch.bfloat16, "cpu")
    found: dict[str, Any] = {"kernels": [compare_call(call) for call in calls.values()]}
    on_gpu = train(torch.bfloat16, WHERE)
    for prefix, result in (("cpu_", on_cpu), ("", on_gpu)):
        found |= {f"{prefix}loss": distance(result[0], exact[0]), f"{prefix}gradients": distance(result[1], exact[1])}
    return found


def compare_call(call: Call) -> dict[str, Any]:
    """The largest errors of a kernel's outputs and gradients."""
    name = getattr(call.entry, "__name__", str(call.entry))
    try:
        exact = run(call.reference, call, "cpu", torch.float32)
        errors = {}
        kernel = call.reference if WHERE == "cpu" else call.entry
        for prefix, function, where in (("cpu_", call.reference, "cpu"), ("", kernel, WHERE)):
            for what, values, expected in zip(("output", "gradient"), run(function, call, where), exact, strict=True):
                pairs = zip(values, expected, strict=True)
                errors[prefix + what] = max((distance(a, b) for a, b in pairs if b is not None), default=0.0)
        return {"kernel": name, **errors}
    except Exception as error:  # of any kernel; the others are compared all the same
        return {"kernel": name, "error": f"{type(error).__name__}: {error}"[:300]}


def run(
    function: Callable, call: Call, where: str, dtype: torch.dtype | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs of a call and the gradients of its arguments, for the same random gradients of the outputs."""

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        kind = dtype if dtype and value.is_floating_point() else value.dtype
        return value.detach().to(where, kind).requires_grad_(value.requires_grad)

    args, kwargs = tree_map(place, (call.args, call.kwargs))
    outputs = [
        x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
    trained = [output for output in outputs if output.requires_grad]
    if not (inputs and trained):
        return outputs, []
    noise = torch.Generator().manual_seed(0)
    above = [torch.randn(output.shape, generator=noise).to(output) for output in trained]
    return outputs, list(torch.autograd.grad(trained, inputs, above, allow_unused=True))


# -- packed ------------------------------------------------------------------------------------------------------------
def compare_packed(source: str, _: Recorder) -> dict[str, Any]:
    """Two documents in each of two rows, beside each document alone; logits None: the model has no packing."""
    separate = build(source, torch.bfloat16, WHERE)
    if separate.family.packing is None:
        return {"logits": None}
    together = build(source, torch.bfloat16, WHERE, packed=True)
    tokens = batch(separate)
    edges = [edge for row in range(ROWS) for edge in (row * LENGTH, row * LENGTH + CUT)] + [ROWS * LENGTH]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(edges)]).view(ROWS, LENGTH)
    packing = {"positions": positions, "cu_seqlens": torch.tensor(edges, dtype=torch.int32)}
    packing = {name: upload(tensor, tokens.device) for name, tensor in packing.items()}
    documents = tokens[:, :CUT].contiguous(), tokens[:, CUT:].contiguous()
    with torch.no_grad():
        alone = torch.cat([separate(document) for document in documents], 1)
        found = {"logits": distance(together(tokens, **packing), alone), "leaking": distance(separate(tokens), alone)}
    together(tokens, labels=tokens, **packing).backward()
    for document in documents:
        separate(document, labels=document).backward()
    return found | {"gradients": distance(gradients(together), gradients(separate))}


def main(spec: dict[str, Any]) -> None:
    if not stubbed():
        use_first_configuration()
    recorder = Recorder()
    reference.enable()
    compare = {"kernels": compare_kernels, "packed": compare_packed}[spec["check"]]
    with open(spec["result"], "a") as file:
        for name in spec["configs"]:
            source = name if Path(name).exists() else str(ROOT / f"configs/{name}.json")
            try:
                found = compare(source, recorder)
            except Exception as error:  # of any model; the others are compared all the same
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(name, json.dumps(found), flush=True)
            file.write(json.dumps({"config": name, **found}) + "\n")
            file.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
