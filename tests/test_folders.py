"""Folders of compiled kernels: which are trusted, which is taken, and what is said of it."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusedlstm import folders
from fusedlstm.folders import Store, cuda_kernels, is_private, user_cache

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere users are kept apart by their folders")

ME, ROOT, OTHER = os.getuid(), 0, os.getuid() + 12345


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's temporary folder, which is not there yet."""
    folders._place.cache_clear()
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(place))
    yield place / f"fusedlstm-{ME}"
    folders._place.cache_clear()


def status(owner: int, mode: int, group: int = 5) -> Any:
    return SimpleNamespace(st_uid=owner, st_gid=group, st_mode=mode)


@pytest.mark.parametrize(
    ("owner", "mode", "private"),
    [
        (ME, 0o700, True),
        (ME, 0o755, True),
        (ROOT, 0o755, True),
        (OTHER, 0o700, False),
        (OTHER, 0o755, False),
        (ME, 0o777, False),
        (ME, 0o757, False),
        (ROOT, 0o777, False),
        (ME, 0o775, False),
    ],
)
def test_what_others_may_change_is_not_private(
    monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, private: bool
) -> None:
    monkeypatch.setattr(folders, "_is_own_group", lambda number: False)
    assert is_private(status(owner, mode)) == private


def test_who_owns_the_package_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs anyway."""
    monkeypatch.setattr(folders.os, "stat", lambda path: status(OTHER, 0o644))
    assert is_private(status(OTHER, 0o644))


@pytest.mark.parametrize(
    ("name", "members", "own"),
    [("me", [], True), ("me", ["me"], True), ("me", ["me", "you"], False), ("users", [], False)],
)
def test_a_group_of_the_user_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, members: list[str], own: bool
) -> None:
    monkeypatch.setattr("pwd.getpwuid", lambda number: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr("grp.getgrgid", lambda number: SimpleNamespace(gr_name=name, gr_mem=members))
    assert is_private(status(ME, 0o775)) == own


def test_a_user_or_a_group_without_a_name() -> None:
    assert not is_private(status(ME, 0o775, group=2**31 - 7))


def test_the_first_folder_that_can_be_made_is_taken(tmp_path: Path, temporary: Path) -> None:
    store = Store("VARIABLE", (Path("/proc/none/a"), tmp_path / "b" / "c", tmp_path / "d"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.place() == tmp_path / "b" / "c"
    assert store.folders() == (tmp_path / "b" / "c",)
    assert not (tmp_path / "d").exists()
    assert not temporary.exists()


def test_kernels_are_looked_for_in_all_folders_that_are_trusted(tmp_path: Path, temporary: Path) -> None:
    names = [tmp_path / name for name in "abc"]
    for folder in (*names, temporary):
        folder.mkdir()
    names[1].chmod(0o777)
    assert Store("VARIABLE", tuple(names)).folders() == (names[0], names[2], temporary)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_passed_over(tmp_path: Path, mode: int, temporary: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(mode)
    with pytest.warns(UserWarning, match="other users may write to it") as said:
        assert Store("VARIABLE", (tmp_path / "a",)).place() == temporary
    assert len(said) == 1
    assert said[0].filename == __file__
    for part in (str(tmp_path / "a"), str(temporary), "environment variable VARIABLE"):
        assert part in str(said[0].message)
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


def test_it_is_said_once(tmp_path: Path, temporary: Path) -> None:
    store = Store("VARIABLE", (Path("/proc/none/a"),))
    with pytest.warns(UserWarning, match="No such file or directory"):
        assert store.place() == temporary
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.place() == temporary


@pytest.mark.parametrize(("mode", "trusted"), [(0o777, False), (0o1777, True), (0o755, True)])
def test_others_may_not_put_a_folder_in_its_place(tmp_path: Path, mode: int, trusted: bool) -> None:
    folder = tmp_path / "above" / "here"
    folder.mkdir(parents=True)
    folder.parent.chmod(mode)
    assert folders._is_closed(folder) == trusted


def test_a_link_of_another_user_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "mine")
    assert folders._is_closed(link)
    monkeypatch.setattr(Path, "lstat", lambda path: status(OTHER, 0o777))
    assert not folders._is_closed(link)


def test_a_temporary_folder_that_somebody_else_has_made_is_not_taken(temporary: Path) -> None:
    temporary.mkdir()
    temporary.chmod(0o777)
    with pytest.warns(UserWarning, match="Each process compiles its own; for good, set the environment"):
        assert Store("VARIABLE", ()).place() is None


def test_without_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    store = Store("VARIABLE", ())
    assert store.folders() == ()
    with pytest.warns(UserWarning, match="there is no home"):
        assert store.place() is None


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    assert user_cache() == (Path.home() / ".cache" / "fusedlstm",)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("FUSEDLSTM_CACHE", raising=False)
    assert user_cache() == cuda_kernels().wanted == ()
