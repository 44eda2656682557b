import pytest
from torchtitan.protocols.train_spec import _extra_train_specs


@pytest.fixture(autouse=True)
def unregistered_specs():
    yield
    _extra_train_specs.clear()
