"""Folders of compiled kernels, for this user alone: what lies there is run."""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from .once import once


class Store(NamedTuple):
    """Where compiled kernels are kept: machine code, so nowhere where others could put theirs."""

    variable: str  # the environment variable that names a folder
    wanted: tuple[Path, ...]  # where kernels should be, the best place first

    def folders(self) -> tuple[Path, ...]:
        """Those in which kernels may be looked for."""
        return tuple(filter(_is_closed, (*self.wanted, *_temporary())))

    def place(self) -> Path | None:
        """The folder to put more kernels in, which is there; None if there can be none.

        Warns, once, where they will not last.
        """
        return _place(self)


def user_cache() -> tuple[Path, ...]:
    """The folder of this package in the user's home, if there is one."""
    try:
        return (Path.home() / ".cache" / "fusedlstm",)
    except RuntimeError:  # a user that the system does not know
        return ()


def cuda_kernels() -> Store:
    """The folders of compiled CUDA kernels."""
    chosen = os.environ.get("FUSEDLSTM_CACHE")
    return Store("FUSEDLSTM_CACHE", (Path(chosen),) if chosen else user_cache())


def user_number() -> str:
    """What tells this user from others in the name of a folder."""
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()


def is_private(status: os.stat_result) -> bool:
    """Whether nobody may change a file or folder who could not change the code of this package as well.

    A group that has the user's name and no other member, as many systems give to each user, is the user.
    """
    if os.name != "posix":  # where users are kept apart by the folders that they are given
        return True
    if status.st_uid not in _owners() or status.st_mode & stat.S_IWOTH:
        return False
    return not status.st_mode & stat.S_IWGRP or _is_own_group(status.st_gid)


def _owners() -> set[int]:
    """Whose code runs in this process anyway."""
    return {os.getuid(), 0, os.stat(__file__).st_uid}


def _is_own_group(number: int) -> bool:
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # without a name
        return False
    return group.gr_name == user and {*group.gr_mem} <= {user}


def _is_closed(folder: Path) -> bool:
    """Whether a folder is there and others can neither write to it nor put another in its place."""
    try:
        here, above = folder.stat(), folder.parent.stat()
        is_link_of_others = os.name == "posix" and folder.lstat().st_uid not in _owners()
    except OSError:
        return False
    keeps_names = is_private(above) or bool(above.st_mode & stat.S_ISVTX)  # as /tmp does
    return is_private(here) and keeps_names and not is_link_of_others


def _temporary() -> tuple[Path, ...]:
    """The user's folder among the temporary ones, if there are any."""
    try:
        return (Path(tempfile.gettempdir()) / f"fusedlstm-{user_number()}",)
    except OSError:
        return ()


def _refusal(folder: Path, mode: int) -> str | None:
    """Why kernels cannot be put in a folder, which is made if need be."""
    try:
        if not folder.is_dir():
            folder.mkdir(mode, parents=True, exist_ok=True)
        if not _is_closed(folder):
            return "other users may write to it"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


@once
def _place(store: Store) -> Path | None:
    refusals = {}
    for folder in store.wanted:
        if (reason := _refusal(folder, 0o755)) is None:
            return folder
        refusals[folder] = reason
    place = next((folder for folder in _temporary() if _refusal(folder, 0o700) is None), None)
    reasons = "; ".join(f"{folder}: {reason}" for folder, reason in refusals.items())
    warn(
        f"compiled kernels cannot be kept where they should be ({reasons or 'there is no home'}). "
        + (f"They lie in {place} as long as that lasts" if place else "Each process compiles its own")
        + f"; for good, set the environment variable {store.variable} to a folder that you alone may write to"
    )
    return place


def warn(message: str) -> None:
    """Warn in the name of who called this package, through whatever libraries in between."""
    frame: FrameType | None = sys._getframe()
    level = outside = 1
    while frame is not None:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
            outside = level
        frame = frame.f_back
    warnings.warn(message, stacklevel=outside)
