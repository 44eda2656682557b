"""The ranks of a run connect over gloo, by a network interface that each of them takes or is told."""

import pytest

from flame.errors import REFUSED, UserError
from flame.runtime.consensus import naming_interface
from tests.launch import SMALL, train
from tests.tiny import write_config


def test_an_interface_that_is_not_there_is_rejected_by_the_name_of_its_variable(tmp_path):
    flags = (*SMALL, f"--job.dump_folder={tmp_path}/run", f"--model.config={write_config(tmp_path, 'llama')}")
    done = train(*flags, "--training.steps=1", GLOO_SOCKET_IFNAME="nosuch0")
    assert "flame: GLOO_SOCKET_IFNAME: found nosuch0, must be the network interface " in done.stderr
    assert f"exitcode  : {REFUSED}" in done.stderr
    assert not (tmp_path / "run").exists()


UNKNOWN = "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: nosuch0"
TOO_LATE = "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.h:311] Connect timeout [none]"
TURNED_AWAY = "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: Connection refused"
ENDED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:50924."


@pytest.mark.parametrize("said", [UNKNOWN, TOO_LATE, TURNED_AWAY])
def test_an_interface_that_reaches_no_other_rank_is_named(said):
    with pytest.raises(UserError) as error, naming_interface():
        raise RuntimeError(said)
    assert error.value.setting == "GLOO_SOCKET_IFNAME" and said in error.value.hint


@pytest.mark.parametrize("said", [ENDED, f"Gloo connectFullMesh failed with {ENDED}", "[gloo/algorithm.cc] Timed out"])
def test_a_rank_that_ends_while_the_others_connect_is_no_mistake_of_the_interface(said):
    with pytest.raises(RuntimeError) as error, naming_interface():
        raise RuntimeError(said)
    assert str(error.value) == said and not isinstance(error.value, UserError)
