"""Points become rows, rows a table and a picture."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from runner.config import BUDDY_POLICIES
from runner.quality.frontier import (
    FrontierPoint,
    FrontierSetting,
    frontier_json,
    rows_of,
    settings_of,
)
from runner.quality.frontier_svg import QUANTIZATION_STEPS, frontier_svg
from runner.quality.frontier_table import footer_lines, header_lines, row_line
from tests.runner.frontier_fakes import FRONTIER_BASE, point_of

SVG = "{http://www.w3.org/2000/svg}"
EXACT = point_of("off", 0.0, kl_mean=0.0, tokens_per_s=61.7, bytes_read=12_000_000_000)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# settings


def test_the_exact_run_comes_again_and_then_budget_by_budget_for_each_policy() -> None:
    found = settings_of(["router", "drop"], [0.02, None], 2, 1)
    assert found == [
        FrontierSetting("off", 0.0, 2),
        FrontierSetting("router", 0.02, 2),
        FrontierSetting("router", 1.0, 1),
        FrontierSetting("drop", 0.02, 2),
        FrontierSetting("drop", 1.0, 1),
    ]


def test_only_random_runs_with_several_seeds() -> None:
    found = settings_of(["random", "router"], [0.5], 2, 3)
    assert [(s.policy, s.seed) for s in found[1:]] == [
        ("random", 0), ("random", 1), ("random", 2), ("router", 0),
    ]  # fmt: skip


def test_nothing_runs_twice() -> None:
    assert len(settings_of(["router", "router"], [0.05, 0.05], 2, 1)) == 2
    assert len(settings_of(["router"], [1.0, None], 1, 1)) == 2  # all is 100 % from rank 1
    assert len(settings_of(["router"], [1.0, None], 2, 1)) == 3


def test_budgets_have_names() -> None:
    labels = [FrontierSetting("router", b, r).budget_label for b, r in
              [(0.02, 2), (0.125, 2), (1.0, 2), (1.0, 1), (0.05, 1)]]  # fmt: skip
    assert labels == ["2 %", "12.5 %", "100 %", "all", "5 %"]
    assert FrontierSetting("router", 0.02, 2).label == "router, 2 %"
    assert FrontierSetting("off", 0.0, 2).label == "exact again"


# rows


def test_ratios_are_those_to_the_exact_run() -> None:
    (row,) = rows_of([point_of("router")])
    assert row.speed_ratio == 123.4 / 61.7 == 2.0
    assert row.bytes_ratio == 0.5
    assert row.bytes_per_token == 6_000_000_000 / 1234
    assert (row.substituted_weight, row.substituted_pairs) == (0.15, 0.25)  # dropped ones too


def test_seeds_are_one_row_with_their_mean_and_deviation() -> None:
    points = [
        point_of("random", seed=seed, kl_mean=kl, ppl_ratio=ratio, top1_agreement=0.9)
        for seed, kl, ratio in [(0, 0.01, 1.0), (1, 0.02, 1.1), (2, 0.03, 1.2)]
    ]
    first, other = rows_of([*points, point_of("router", kl_mean=0.5, kl_mean_error=0.07)])
    assert first.n_seeds == 3
    assert first.kl == pytest.approx(0.02) and first.kl_error == pytest.approx(0.01)
    assert first.ppl_ratio == pytest.approx(1.1) and first.ppl_ratio_error == pytest.approx(0.1)
    assert first.same_top == pytest.approx(0.9)
    assert (other.n_seeds, other.kl, other.kl_error) == (1, 0.5, 0.07)


def test_an_endless_perplexity_of_one_seed_is_no_error() -> None:
    points = [
        point_of("random", seed=seed, ppl_ratio=ratio) for seed, ratio in [(0, math.inf), (1, 1.0)]
    ]
    (row,) = rows_of(points)
    assert row.ppl_ratio == math.inf and math.isnan(row.ppl_ratio_error)
    assert "inf ± nan" in row_line(row)


def test_budgets_and_ranks_are_rows_of_their_own() -> None:
    settings = [("router", 0.05, 2), ("router", 1.0, 2), ("router", 1.0, 1), ("drop", 1.0, 1)]
    assert len(rows_of([point_of(*setting) for setting in settings])) == 4


@pytest.mark.parametrize(
    ("budget", "reached", "expected"),
    [(0.2, 0.19, False), (0.2, 0.17, True), (1.0, 0.17, False), (0.05, 0.04, True)],
)
def test_a_bounded_budget_that_is_not_spent_is_noticed(
    budget: float, reached: float, expected: bool
) -> None:
    (row,) = rows_of([point_of("router", budget, substituted_weight_share=reached)])
    assert row.stayed_below is expected


# the table


def test_the_table_has_a_cell_for_every_column_and_its_rows_one_width() -> None:
    rows = rows_of([EXACT, point_of("router"), point_of("random", 1.0, 1)])
    lines = [*header_lines(FRONTIER_BASE), *map(row_line, rows)]
    assert {len(cells(line)) for line in lines} == {10}
    assert len({len(line) for line in lines}) == 1


def test_the_first_row_is_the_exact_run() -> None:
    *_, exact = header_lines(FRONTIER_BASE)
    assert cells(exact) == [
        "exact", "-", "-", "-", "9.72 MB (1.00)", "61.7 (1.00)", "0", "0", "1", "100 %",
    ]  # fmt: skip
    (again,) = rows_of([EXACT])
    assert cells(row_line(again))[:2] == ["exact again", "-"]


def test_a_row_says_what_was_given_and_what_came_of_it() -> None:
    point = point_of(
        "router", 0.2, substituted_weight_share=0.1912, kl_mean=0.01234, kl_mean_error=0.0005,
        kl_p99=0.3, ppl_ratio=1.0123, ppl_ratio_error=0.0045, top1_agreement=0.931,
    )  # fmt: skip
    (row,) = rows_of([point])
    assert cells(row_line(row)) == [
        "router", "20 %", "19.12 %", "25.00 %", "4.86 MB (0.50)", "123.4 (2.00)",
        "0.01234 ± 0.00050", "0.3000", "1.0123 ± 0.0045", "93.1 %",
    ]  # fmt: skip


def test_what_stayed_below_its_budget_is_marked_and_the_mark_explained() -> None:
    rows = rows_of([point_of("router", 0.2), point_of("router", 0.15)])
    assert [cells(row_line(row))[1:3] for row in rows] == [
        ["20 % *", "15.00 %"],
        ["15 %", "15.00 %"],
    ]
    assert any(line.startswith("*: ") for line in footer_lines(FRONTIER_BASE, rows))
    assert not any(line.startswith("*: ") for line in footer_lines(FRONTIER_BASE, rows[1:]))


def test_the_footer_says_what_was_measured_and_that_speeds_are_noisy() -> None:
    rows = rows_of([point_of("random", seed=seed) for seed in range(3)])
    assert cells(row_line(rows[0]))[0] == "random (3x)"
    footer = "\n".join(footer_lines(FRONTIER_BASE, rows))
    assert footer.startswith(
        "some.gguf, 4 slots a layer; 1234 tokens of a.txt, b.txt in 3 windows of up to 512 tokens"
    )
    assert "what else the machine did" in footer and "(Nx): the mean of N seeds" in footer
    assert "(Nx)" not in "\n".join(footer_lines(FRONTIER_BASE, []))


def test_names_cannot_control_the_terminal() -> None:
    base = replace(FRONTIER_BASE, model="\x1b[2J.gguf", texts=("a\n\x9b1m",))
    assert not {"\x1b", "\x9b", "\n"} & set("".join(footer_lines(base, [])))


# JSON


def test_json_has_every_figure_of_every_point_and_the_settings_asked_for() -> None:
    point = point_of("random", 0.2, 1, seed=7)
    refused = replace(point.evaluation, policy="off", buddy_budget=0.0)  # nothing could be missing
    found = frontier_json(FRONTIER_BASE, [replace(point, evaluation=refused)], {"max_tokens": 9})
    assert list(found)[:2] == ["format", "version"]
    assert (found["format"], found["version"]) == ("buddyrun-frontier", 1)
    assert (found["model"], found["model_hash"]) == ("some.gguf", "ab12")
    assert found["settings"] == {"max_tokens": 9}
    assert found["base"]["tokens_per_s"] == 61.7 and found["base"]["n_tokens"] == 1234
    (values,) = found["points"]
    assert set(point.evaluation.as_json()) <= set(values)
    assert [values[name] for name in ("policy", "budget", "min_rank", "seed")] == [
        "random", 0.2, 1, 7,
    ]  # fmt: skip


def test_json_has_null_for_what_is_no_number() -> None:
    found = frontier_json(FRONTIER_BASE, [point_of("drop", ppl=math.inf)], {})
    assert json.loads(json.dumps(found, allow_nan=False))["points"][0]["ppl"] is None


# the picture


def drawn(points: list[FrontierPoint]) -> ElementTree.Element:
    return ElementTree.fromstring(frontier_svg(points, FRONTIER_BASE))


def titles(picture: ElementTree.Element) -> list[str]:
    found = picture.findall(f"{SVG}g[@class='point']/{SVG}title")
    return [title.text or "" for title in found]


def texts(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def numbers(picture: ElementTree.Element) -> list[float]:
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r")
    return [float(e.attrib[name]) for e in picture.iter() for name in names if name in e.attrib]


def test_every_point_is_drawn_in_both_panels() -> None:
    points = [EXACT] + [
        point_of(policy, budget, kl_mean=budget * (number + 1) / 9)
        for number, policy in enumerate(BUDDY_POLICIES)
        for budget in (0.02, 0.05, 1.0)
    ]
    found = titles(drawn(points))
    assert len(found) == 2 * len(points)
    for point in points:
        assert sum(title.startswith(f"{point.setting.label}:") for title in found) == 2


def test_every_policy_looks_different_and_stands_in_the_legend() -> None:
    picture = drawn([point_of(policy) for policy in BUDDY_POLICIES])
    lines = list(picture.iter(f"{SVG}polyline"))
    assert len(lines) == 2 * len(BUDDY_POLICIES)
    assert len({line.attrib["stroke"] for line in lines}) == len(BUDDY_POLICIES)
    shapes = set()
    for group in picture.findall(f"{SVG}g[@class='point']"):
        attributes = dict(group[1].attrib)
        turned = "rotate" in attributes.pop("transform")
        kept = {name: attributes.get(name) for name in ("points", "d", "r")}
        is_hollow = attributes.get("fill") == "#ffffff"
        shapes.add((group[1].tag, turned, is_hollow, *kept.values()))
    assert len(shapes) == len(BUDDY_POLICIES)
    assert set(BUDDY_POLICIES) <= set(texts(picture))


def test_axes_are_named_and_quantization_is_marked() -> None:
    found = texts(drawn([point_of("router")]))
    assert {"Speed, times exact", "Bytes read, times exact"} <= set(found)
    assert found.count("mean KL divergence from the exact run, nats") == 2
    for name, _ in QUANTIZATION_STEPS:
        assert found.count(name) == 2
    assert any("LLaMA-3-8B, KL against f16" in text for text in found)


def test_the_background_is_white_and_a_reader_knows_whose_file_it_is() -> None:
    picture = drawn([point_of("router")])
    assert picture.attrib["id"] == "buddyrun-frontier"
    background = picture.find(f"{SVG}rect")
    assert background is not None and background.attrib["fill"] == "#ffffff"
    assert background.attrib["width"] == picture.attrib["width"]


def test_a_larger_kl_is_further_right_and_no_kl_left_of_the_break() -> None:
    places = []
    for kl in (0.0, 1e-6, 0.001, 1.0, 20.0):
        everything = [point_of("drop", kl_mean=20.0), point_of("similar", kl_mean=1e-6)]
        picture = drawn([*everything, point_of("router", kl_mean=kl)])
        lines = [line for line in picture.iter(f"{SVG}polyline")]
        places.append(float(lines[2].attrib["points"].split(",")[0]))
    assert places == sorted(places) and len(set(places)) == 5


def test_more_speed_is_higher() -> None:
    slow, fast = (point_of(policy, tokens_per_s=speed) for policy, speed in
                  [("router", 50.0), ("blend", 99.0)])  # fmt: skip
    first, second, *_ = drawn([slow, fast]).iter(f"{SVG}polyline")
    heights = [float(line.attrib["points"].split(",")[1]) for line in (first, second)]
    assert heights[0] > heights[1]  # y grows downwards


def test_points_without_numbers_are_left_out() -> None:
    good = point_of("router")
    bad = [
        point_of("drop", kl_mean=math.nan),
        point_of("random", kl_mean=math.inf),
        point_of("prior", tokens_per_s=math.nan),
    ]
    picture = drawn([good, *bad])
    assert [title.split(",")[0] for title in titles(picture)] == ["router", "router", "prior"]
    source = frontier_svg([good, *bad], FRONTIER_BASE)
    assert "nan" not in source and "inf" not in source
    assert all(map(math.isfinite, numbers(picture)))


def test_without_points_the_axes_are_there() -> None:
    assert titles(drawn([])) == []
    assert "Q8_0" in texts(drawn([]))


def test_names_are_escaped() -> None:
    base = replace(FRONTIER_BASE, model='<b>&"\x1b\ufffe')
    picture = ElementTree.fromstring(frontier_svg([point_of("<x>&\x00")], base))
    assert any('<b>&"' in text for text in texts(picture))
    assert "<x>&\u2400" in texts(picture)


def test_seeds_are_dots_around_their_mean() -> None:
    points = [point_of("random", seed=seed, kl_mean=0.01 * (seed + 1)) for seed in range(3)]
    picture = drawn(points)
    assert len(titles(picture)) == 2
    dots = [c for c in picture.findall(f"{SVG}circle") if c.attrib["r"] == "1.6"]
    assert len(dots) == 6
