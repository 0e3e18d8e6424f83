"""Numbers on the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(least: int) -> Callable[[str], int]:
    """What reads an integer that is at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse


def not_negative(text: str) -> float:
    """A finite number from 0 on.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def positive(text: str) -> float:
    """A finite number above 0.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not enough")
    return value
