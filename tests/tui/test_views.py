"""Colours that can be told apart without hues, and characters without colours."""

import colorsys
import math

import pytest

from tui.pair_classes import PAIR_CLASSES
from tui.views import ASCII_SECOND, CURSOR, N_CODES, SUBSTITUTIONS, VIEWS, Rgb, View


def luminance(color: Rgb) -> float:
    """Relative, as WCAG defines it."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in color)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def as_seen_with_two_cones(color: Rgb, matrix: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """Machado, Oliveira and Fernandes 2009, severity 1, on linear values."""
    linear = [(value / 255) ** 2.2 for value in color]
    return tuple(sum(m * v for m, v in zip(row, linear, strict=True)) for row in matrix)


PROTANOPIA = ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052))
DEUTERANOPIA = ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969))


@pytest.mark.parametrize(
    "view", [view for view in VIEWS if view.has_levels], ids=lambda view: view.name
)
@pytest.mark.parametrize("kind", [0, 1])
def test_more_is_brighter(view: View, kind: int) -> None:
    shades = [luminance(view.palette[code]) for code in range(2 + kind, N_CODES, 2)]
    assert shades == sorted(shades) and shades[-1] > 3 * shades[0]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_the_cursor_looks_like_no_level(view: View) -> None:
    cursor = view.palette[CURSOR]
    for code in range(N_CODES):
        assert math.dist(cursor, view.palette[code]) > 60
    assert view.characters[CURSOR] not in view.characters[:CURSOR]


def test_without_colours_every_level_has_its_own_character() -> None:
    characters = VIEWS[SUBSTITUTIONS].characters
    assert len(characters) == N_CODES + 1 and characters.isascii()
    assert len(set(characters)) == N_CODES  # nothing is blank for both kinds
    assert ASCII_SECOND[0] == " "


@pytest.mark.parametrize("matrix", [PROTANOPIA, DEUTERANOPIA], ids=["protanopia", "deuteranopia"])
def test_what_became_of_pairs_can_be_told_apart_by_anybody(
    matrix: tuple[tuple[float, ...], ...],
) -> None:
    seen = [as_seen_with_two_cones(each.color, matrix) for each in PAIR_CLASSES]
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            assert math.dist(one, other) > 0.08
    assert len({each.letter for each in PAIR_CLASSES}) == len(PAIR_CLASSES)
    assert len({each.fill for each in PAIR_CLASSES}) == len(PAIR_CLASSES)


def test_replaced_and_stood_in_have_hues_far_apart() -> None:
    palette = VIEWS[SUBSTITUTIONS].palette
    hues = [colorsys.rgb_to_hsv(*(v / 255 for v in palette[code]))[0] for code in (10, 11)]
    assert abs(hues[0] - hues[1]) > 0.3
