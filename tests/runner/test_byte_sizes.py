"""Sizes as a flag takes them and as a person reads them."""

import pytest

from runner.byte_sizes import flag_text, parse_bytes, range_text
from runner.errors import OptionError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GiB", 6 << 30),
        ("6G", 6 << 30),
        ("6g", 6 << 30),
        ("1500M", 1500 << 20),
        ("1.5GB", 1_500_000_000),
        ("1.1GB", 1_100_000_000),
        ("750 kb", 750_000),
        ("640K", 640 << 10),
        ("6144", 6 << 30),
        ("0.5", 1 << 19),
        ("0", 0),
        ("0.0001K", 1),
    ],
)
def test_a_size_is_read_in_every_usual_spelling(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1e3", "6GX", "6 G B", "70%", "1,5G", "nan", "1" * 16, "٣G", "6GİB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="expected one such as 6GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(1, "1KiB"), (8_098_304, "7909KiB"), (10 << 20, "10MiB"), ((6 << 30) + 1, "6145MiB")],
)
def test_a_size_for_a_flag_is_rounded_up(n_bytes: int, text: str) -> None:
    assert flag_text(n_bytes) == text
    assert parse_bytes(text) >= n_bytes


def test_equal_counts_are_one_number() -> None:
    assert range_text((3, 3)) == "3" and range_text((4, 3, 4)) == "3 to 4"
