"""What is refused when the model is registered, before a process group or a folder exists."""

import pytest

from flame.config import parse
from flame.errors import UserError
from flame.spec import register


def test_a_compile_backend_that_torch_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"--compile\.backend: found 'nonsense', must be one of eager, .*inductor"):
        register(parse(["--compile.enable", "--compile.backend=nonsense"]))


def test_a_backend_that_nothing_uses_is_no_mistake():
    register(parse(["--model.config=configs/gla_debug.json", "--compile.backend=nonsense"]))
