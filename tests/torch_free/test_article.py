"""The article's table: its own totals come out, cards have room, and the page says what this code plans."""

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.article import LINES, Card
from memplan.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "article.json").read_text())


def test_the_articles_lines_add_up_to_its_totals() -> None:
    assert [f"{line.usual:.1f}, {line.theirs:.1f}" for line in LINES] == [
        "414.0, 42.0",
        "78.3, 9.8",
        "16.0, 0.0",
        "2.5, 2.5",
    ]
    assert f"{sum(line.usual for line in LINES):.1f}" == "510.8"
    assert f"{sum(line.theirs for line in LINES):.1f}" == "54.3"


def test_the_page_has_what_was_planned(written: Any) -> None:
    assert "\n".join(written["text"]) in (ROOT / "docs" / "article.md").read_text()


def test_the_readme_has_the_least_budgets(written: Any) -> None:
    resident, streamed = (f"{size / 1e9:.1f}" for size in written["least"])
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {resident} and {streamed} GB at least: `memplan article`" in text


def test_every_card_has_room(written: Any) -> None:
    for row in written["cards"]:
        card = Card(**row)
        assert card.fits, card
        assert card.streamed == (card.cache <= 0)
        assert card.needed > 0.95 * card.memory or card.seconds == card.plain_seconds  # room is used, or not needed


def test_the_file_is_of_this_code(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["article", "--machines", "l4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lines"] == written["lines"]
    assert found["cards"] == [card for card in written["cards"] if card["machine"] == "l4"]
    assert found["least"] == written["least"]


@pytest.mark.parametrize(
    ("more", "first"),
    [
        (["--machines", "h101"], "'h101'"),
        (["--host-budget", "many"], "'many'"),
    ],
)
def test_bad_input(more: list[str], first: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["article", *more]) == 2
    assert first in capsys.readouterr().err.splitlines()[0]
