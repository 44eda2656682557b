"""Files that anybody may have written are read without waiting, and without a crash however they are damaged."""

import os
import socket

import pytest

from flame.config.files import check_regular, itself, read_bytes, read_json, read_text
from flame.config.parser import parse
from flame.errors import UserError
from flame.preflight.inputs import check_model


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [pipe, device, listening])
def test_what_is_no_regular_file_is_not_waited_for(make, tmp_path):
    make(tmp_path / "a.json")
    for read in (read_bytes, read_text, read_json):
        with pytest.raises(OSError):
            read(tmp_path / "a.json")
    for path in (tmp_path, tmp_path / "a.json"):
        with pytest.raises(UserError) as error:
            check_regular("--flag", path)
        assert error.value.setting == "--flag" and str(tmp_path / "a.json") in error.value.found


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"3", b"\xff", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 64, b'{"a": 1' + b"0" * 5000],
)
def test_damaged_json_is_a_value_error(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_link_is_read_and_not_written_through(tmp_path):
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    assert read_text(tmp_path / "link") == "kept"
    with pytest.raises(OSError):
        itself(tmp_path / "link", os.O_WRONLY | os.O_APPEND)
    with open(tmp_path / "new", "wb", opener=itself) as file:
        file.write(b"made")
    assert (tmp_path / "theirs").read_text() == "kept" and (tmp_path / "new").read_text() == "made"


@pytest.mark.parametrize("make", [pipe, device])
def test_a_job_file_or_a_model_that_is_no_file_is_one_line(make, tmp_path):
    make(tmp_path / "job.toml")
    make(tmp_path / "model.json")
    with pytest.raises(UserError, match="not a regular file"):
        parse([f"--job.config_file={tmp_path}/job.toml"])
    with pytest.raises(UserError, match="not a regular file"):
        check_model(parse([f"--model.config={tmp_path}/model.json"]))
