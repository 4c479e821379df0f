import os
import stat

import pytest

from compress_bilinear._io import written_atomically
from compress_bilinear.errors import CompressionError


@pytest.fixture
def umask():
    """Files are for their owner and group only, as long as the test runs."""
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_file_has_what_was_written(tmp_path):
    path = tmp_path / "new.txt"
    with written_atomically(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_path_may_be_a_string(tmp_path):
    with written_atomically(str(tmp_path / "new")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "new").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_what_there_was(tmp_path, old, error):
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)

    def write_half() -> None:
        with written_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert [file.read_text() for file in tmp_path.iterdir()] == ([old] if old is not None else [])


def test_an_old_file_stays_whole_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with written_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_new_file_follows_the_umask(tmp_path, umask):
    path = tmp_path / "file"
    with written_atomically(path) as temporary:
        temporary.unlink()
        temporary.write_text("new")
        temporary.chmod(0o600)  # as safetensors makes its files
    assert mode(path) == umask


def test_an_old_file_keeps_its_mode(tmp_path, umask):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o604)
    with written_atomically(path) as temporary:
        temporary.write_text("new")
    assert mode(path) == 0o604


@pytest.mark.parametrize(
    ("name", "problem"),
    [("missing/file", "The folder of .*missing/file' should exist"), ("", "should be a file to write. Found a folder")],
)
def test_a_place_that_cannot_be_is_an_error(tmp_path, name, problem):
    entered = []
    with pytest.raises(CompressionError, match=problem), written_atomically(tmp_path / name):
        entered.append(True)
    assert not entered
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda *question: asked.append(question))  # root may write anywhere
    with (
        pytest.raises(CompressionError, match=r"should be writable\. Found one that is not: name another"),
        written_atomically(tmp_path / "file"),
    ):
        pass
    assert asked == [(tmp_path, os.W_OK)]
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_refused_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CompressionError, match="Found a device, pipe or socket"), written_atomically(pipe):
        pass
    assert pipe.is_fifo()


def test_what_a_link_points_to_is_written_and_the_link_stays(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with written_atomically(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    with written_atomically(tmp_path / ("n" * 250)) as temporary:
        temporary.write_text("new")
    assert (tmp_path / ("n" * 250)).read_text() == "new"
