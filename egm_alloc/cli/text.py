"""Plain text of a terminal's width."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100


def name_and_value(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Return lines of names and values, the values one below the other and wrapped.

    Parameters
    ----------
    rows : sequence of (str, str)
        The names and values.
    indent : str
        Goes before every line.

    Returns
    -------
    str
        The lines, joined, without a final line end.
    """
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        wrapped(value, indent + name.ljust(width), indent + " " * width) for name, value in rows
    )


def wrapped(text: str, first: str = "", further: str = "") -> str:
    """Return a text in lines of at most `WIDTH` characters where words allow it.

    Parameters
    ----------
    text : str
        The text.
    first, further : str
        What the first line and the others begin with.

    Returns
    -------
    str
    """
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
