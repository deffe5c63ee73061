"""Sizes as people write them, and read them."""

import re


def parse_size(text: str) -> int:
    """`4096`, `64KiB`, `256M`, `1GB`: bytes, all units binary. Raises ValueError."""
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match or int(match[1]) < 1:
        raise ValueError(f"{text!r} is not a size: write 4096, 64KiB, 256MiB or 1GiB")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def gib(nbytes: float) -> str:
    """A number of GiB with two decimals, without the unit."""
    return f"{nbytes / 2**30:.2f}"
