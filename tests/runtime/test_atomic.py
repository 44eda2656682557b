import os
import resource

import pytest

from flame.runtime.atomic import HOST, replace_together, write_atomically


@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("data", ["é\n", b"\xff\0"])
def test_a_file_is_replaced_and_nothing_else_is_left(data, fsync, tmp_path):
    for content in (b"a longer old content", data):
        write_atomically(tmp_path / "file.json", content, fsync)
    assert (tmp_path / "file.json").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_full_disk_leaves_the_old_content(tmp_path):
    write_atomically(tmp_path / "file", "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OSError):
            write_atomically(tmp_path / "file", "longer than the limit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_link_in_the_place_of_the_file_or_of_the_temporary_one_is_not_written_through(tmp_path):
    (tmp_path / "theirs").write_text("kept")
    for name in ("file", f"file.{HOST}.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    write_atomically(tmp_path / "file", "new")
    with replace_together({tmp_path / "file": "newer"}):
        (tmp_path / "other").touch()
    assert (tmp_path / "theirs").read_text() == "kept"
    assert (tmp_path / "file").read_text() == "newer" and not (tmp_path / "file").is_symlink()
