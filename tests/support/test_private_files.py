"""Files that are trusted: only those that nobody else can have written, whole, and not too many."""

import os
import threading

import pytest

from gptjax.support.private_files import PrivateFiles

HEAD, BODY = b"head", bytes(range(256)) * 40


@pytest.fixture
def directory(tmp_path):
    """With one file, called name."""
    PrivateFiles(tmp_path / "files", most_bytes=1 << 20).write("name", HEAD, BODY)
    return tmp_path / "files"


def _read(directory, most_bytes: int = 1 << 20) -> tuple[bytes | None, bytes | None]:
    files = PrivateFiles(directory, most_bytes=most_bytes)
    return files.head("name"), files.body("name")


def test_what_was_written_is_read(directory, caplog):
    assert _read(directory) == (HEAD, BODY)
    files = PrivateFiles(directory, most_bytes=1 << 20)
    files.write("name", b"", b"other")
    assert (files.head("name"), files.body("name")) == (b"", b"other")
    assert files.head("none") is files.body("none") is None
    assert PrivateFiles(directory / "none", most_bytes=1).head("name") is None
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "name").stat().st_mode & 0o777 == 0o600
    assert not caplog.records


def _loosen_directory(directory, monkeypatch):
    directory.chmod(0o777)


def _let_the_group_write(directory, monkeypatch):
    (directory / "name").chmod(0o660)


def _let_others_write(directory, monkeypatch):
    (directory / "name").chmod(0o602)


def _link_the_directory(directory, monkeypatch):
    directory.rename(directory.with_name("real"))
    directory.symlink_to(directory.with_name("real"))


def _link_the_file(directory, monkeypatch):
    (directory / "name").rename(directory / "real")
    (directory / "name").symlink_to(directory / "real")


def _give_it_to_another_user(directory, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)


def _give_the_file_to_another_user(directory, monkeypatch):
    if os.geteuid():
        pytest.skip("only the superuser can give files away")
    os.chown(directory / "name", 4321, -1)


def _put_a_pipe_there(directory, monkeypatch):
    (directory / "name").unlink()
    os.mkfifo(directory / "name")


def _put_a_directory_there(directory, monkeypatch):
    (directory / "name").unlink()
    (directory / "name").mkdir()


def _put_a_file_in_the_directorys_place(directory, monkeypatch):
    directory.rename(directory.with_name("real"))
    directory.write_text("x")


@pytest.mark.parametrize(
    "change",
    [
        _loosen_directory,
        _let_the_group_write,
        _let_others_write,
        _link_the_directory,
        _link_the_file,
        _give_it_to_another_user,
        _give_the_file_to_another_user,
        _put_a_pipe_there,
        _put_a_directory_there,
        _put_a_file_in_the_directorys_place,
    ],
)
def test_what_others_can_have_written_is_not_read(directory, monkeypatch, caplog, change):
    change(directory, monkeypatch)
    files = PrivateFiles(directory, most_bytes=1 << 20)
    for _ in range(2):
        assert files.head("name") is None
        assert files.body("name") is None
    assert len(caplog.records) == 1
    assert "is not read" in caplog.text


def test_nothing_is_written_to_a_directory_of_others(directory, caplog):
    directory.chmod(0o777)
    PrivateFiles(directory, most_bytes=1 << 20).write("new", HEAD, BODY)
    assert [file.name for file in directory.iterdir()] == ["name"]
    assert "are not kept in" in caplog.text


def test_a_file_that_others_can_have_written_is_replaced(directory):
    (directory / "name").chmod(0o666)
    PrivateFiles(directory, most_bytes=1 << 20).write("name", HEAD, BODY)
    assert _read(directory) == (HEAD, BODY)


def test_a_link_is_replaced_and_not_followed(directory):
    target = directory.parent / "target"
    target.write_text("theirs")
    (directory / "name").unlink()
    (directory / "name").symlink_to(target)
    PrivateFiles(directory, most_bytes=1 << 20).write("name", HEAD, BODY)
    assert target.read_text() == "theirs"
    assert _read(directory) == (HEAD, BODY)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can write anywhere")
def test_a_directory_that_cannot_be_written_is_no_error(directory, caplog):
    directory.chmod(0o500)
    PrivateFiles(directory, most_bytes=1 << 20).write("new", HEAD, BODY)
    assert "are not kept in" in caplog.text
    directory.chmod(0o700)


def test_a_full_disk_leaves_nothing_behind(directory, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    PrivateFiles(directory, most_bytes=1 << 20).write("new", HEAD, BODY)
    assert [file.name for file in directory.iterdir()] == ["name"]
    assert "No space left" in caplog.text


def test_those_not_used_for_longest_make_room(tmp_path):
    files = PrivateFiles(tmp_path / "files", most_bytes=40_000)
    for number in range(3):
        files.write(f"{number}", HEAD, BODY)
        os.utime(tmp_path / "files" / f"{number}", (number, number))
    assert files.body("0") == BODY  # is used now
    files.write("3", HEAD, BODY)
    assert {file.name for file in (tmp_path / "files").iterdir()} == {"0", "2", "3"}
    files.write("4", HEAD, bytes(50_000))  # would not even fit alone
    assert {file.name for file in (tmp_path / "files").iterdir()} == {"0", "2", "3"}


def test_what_killed_processes_left_is_removed(directory):
    old, new = directory / "a.0.partial", directory / "b.0.partial"
    for partial in (old, new):
        partial.write_bytes(BODY)
    os.utime(old, (0, 0))
    PrivateFiles(directory, most_bytes=1 << 20).write("next", HEAD, BODY)
    assert {file.name for file in directory.iterdir()} == {"name", "next", "b.0.partial"}


def test_a_reader_sees_one_of_those_that_are_written_at_once(directory):
    contents = [bytes([number]) * 100_000 for number in range(4)]
    stop = threading.Event()

    def write(content: bytes) -> None:
        files = PrivateFiles(directory, most_bytes=1 << 20)
        while not stop.is_set():
            files.write("name", HEAD, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    try:
        bodies = [_read(directory)[1] for _ in range(200)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert set(bodies) <= {BODY, *contents}
    assert [file.name for file in directory.iterdir()] == ["name"]
