"""A plan as a picture: what is drawn stands where its numbers say."""

import re
from xml.etree import ElementTree as ET

import pytest

from wholebatch.core.picture import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Picture

MIB = 1 << 20


def kinds(rows):
    return {"weights": 10 * MIB, "activations": rows * MIB, "buffers": 10}


def drawn(**options):
    return ET.fromstring(Picture(**{"kinds": kinds, "most": 40, "budget": 30 * MIB} | options).svg())


def parts(svg, name):
    return svg.findall(f"{{http://www.w3.org/2000/svg}}{name}")


def words(svg):
    return [each.text for each in parts(svg, "text")]


def test_layers_add_up_and_end_at_the_peak():
    svg = drawn(chosen=20)
    below, above = (
        [tuple(map(float, point.split(","))) for point in each.get("points").split()]
        for each in parts(svg, "polygon")[:2]
    )
    assert below[: len(below) // 2] == above[len(above) // 2 :][::-1]  # one stands on the other
    (dot,) = parts(svg, "circle")
    assert float(dot.get("cx")) == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) / 2, abs=0.1)
    budget = float(parts(svg, "polyline")[0].get("points").split()[0].split(",")[1])
    assert float(dot.get("cy")) == pytest.approx(budget, abs=0.1)  # 20 rows take the 30 MiB that there are
    assert "20 rows, 30 MiB" in words(svg)
    assert "budget 30 MiB" in words(svg)


def test_kinds_that_are_too_thin_to_be_seen_are_one():
    said = words(drawn())
    assert "buffers" not in said
    assert said.index("other") < said.index("activations") < said.index("weights")


def test_what_was_measured_is_marked_where_it_lies():
    svg = drawn(measured={10: 20 * MIB, 1000: 1})
    marks = [each for each in parts(svg, "path") if each.get("class") == "measured"]
    assert len(marks) == 2  # one is of the legend, and what lies outside is left out
    x, y = map(float, re.match(r"M(\S+) ([\d.]+)", marks[0].get("d")).groups())
    assert x + 4 == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) / 4, abs=0.1)
    top = 50 * 1.08
    assert y + 4 == pytest.approx(HEIGHT - BOTTOM - (HEIGHT - 14 - BOTTOM) * 20 / top, abs=0.1)
    assert "measured" in words(svg)
    assert "measured" not in words(drawn())


@pytest.mark.parametrize(("most", "size"), [(1, 1), (2, 1000), (3, 1 << 20), (512, 5 << 40), (100_000, 1 << 30)])
def test_any_size_has_a_few_round_numbers(most, size):
    svg = drawn(kinds=lambda rows: {"weights": 1 + size * rows // most}, most=most, budget=1 << 60, longest=512)
    numbers = [each for each in words(svg) if each and each[0].isdigit()]
    assert 3 <= len(numbers) <= 14
    assert not any("budget" in each for each in words(svg))  # far above all that is drawn
    assert "rows of 512 tokens in a micro-batch" in words(svg)
