"""Compares references with the Triton kernels of fla that they replace: forward and gradients, in the interpreter.

A test file holds `cases()` and runs itself again as a script: the interpreter must be on before fla is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def outputs_and_gradients(function, inputs):
    # Clones, because the convolution's step writes into its cache.
    named = inputs if isinstance(inputs, dict) else dict(enumerate(inputs))
    leaves = {
        name: x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
        for name, x in named.items()
    }
    found = function(**leaves) if isinstance(inputs, dict) else function(*leaves.values())
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    wanted = [x for x in leaves.values() if torch.is_tensor(x) and x.requires_grad]
    if not wanted:
        return found
    rng = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=rng)).sum() for x in found)
    return [*found, *torch.autograd.grad(loss, wanted)]


def compare(cases):
    """case -> the largest error of any output or gradient, relative to its largest value."""
    errors = {}
    for name, (kernel, reference, inputs) in cases.items():
        expected, found = (outputs_and_gradients(f, inputs) for f in (kernel, reference))
        pairs = zip(found, expected, strict=True)
        errors[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return errors


def run(file, *arguments):
    """What the script `file` prints last, run in a process of its own where it may switch the interpreter on."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, file, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def worst(found, expected):
    """The largest difference relative to the largest expected value, over pairs of tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def gradients(outputs, inputs):
    # A fixed random projection of every output: equal gradients of it mean equal Jacobian products.
    rng = torch.Generator().manual_seed(9)
    loss = sum((o.double() * torch.randn(o.shape, generator=rng, dtype=torch.float64)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)
