"""Bytes as people write them and read them: "24GB" -> 24_000_000_000 -> "24.00 GB"."""

import re
from fractions import Fraction

from memplan.errors import MemplanError, did_you_mean

UNITS = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_LOWER = {unit.lower(): unit for unit in UNITS}
_NUMBER = re.compile(r"([+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))\s*([^0-9].*)?", re.DOTALL)


def parse_bytes(text: str | int) -> int:
    """A size in bytes from "24GB" (10**9), "24GiB" (2**30), "512 MB" or an int of bytes; it must be positive."""
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif isinstance(text, str):
        size = _parse(text)
    else:
        raise MemplanError(f'{text!r} is not a size: write a number with a unit, like "24GB", or an int of bytes')
    if size <= 0:
        raise MemplanError(f'{text!r} is not a size: it must be at least one byte, like "24GB"')
    return size


def _parse(text: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise MemplanError(f'{text!r} is not a size: write a number with a unit, like "24GB" or "512 MiB"')
    number, word = Fraction(match[1]), match[2] or ""
    if not word and number > 0:
        # A bare number is most likely gigabytes, unless it is large enough to have been meant as bytes.
        unit = "B" if number >= 2**20 else "GB"
        raise MemplanError(f'{text!r} has no unit (bytes are given as an int); did you mean "{match[1]}{unit}"?')
    unit = _LOWER.get(word.lower(), "")
    if word and not unit:
        raise MemplanError(
            f"{text!r} has unit {word!r}, and the units are {', '.join(UNITS)}{did_you_mean(word.upper(), UNITS)}"
        )
    return int(number * UNITS[unit or "B"])


def human(size: int) -> str:
    """A size in decimal units, four digits: "24.00 GB", "512 B". Budgets are written so, and differences add up."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        value = size / scale
        if abs(value) >= 0.99995:  # less would be rounded to 1000.0 of the next smaller unit
            return f"{value:.{max(4 - len(str(int(abs(value)))), 1)}f} {unit}"
    return f"{size} B"
