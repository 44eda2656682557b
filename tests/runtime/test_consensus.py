"""The ranks of a run connect over gloo, by a network interface that each of them takes or is told."""

from flame.errors import REFUSED
from tests.launch import SMALL, train
from tests.tiny import write_config


def test_an_interface_that_is_not_there_is_rejected_by_the_name_of_its_variable(tmp_path):
    flags = (*SMALL, f"--job.dump_folder={tmp_path}/run", f"--model.config={write_config(tmp_path, 'llama')}")
    done = train(*flags, "--training.steps=1", GLOO_SOCKET_IFNAME="nosuch0")
    assert "flame: GLOO_SOCKET_IFNAME: found nosuch0, must be the network interface " in done.stderr
    assert f"exitcode  : {REFUSED}" in done.stderr
    assert not (tmp_path / "run").exists()
