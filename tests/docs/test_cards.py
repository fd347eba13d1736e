"""Every method card answers the same questions, in the same order."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.versionless

CARDS = sorted(Path(__file__).resolve().parents[2].glob("plugins/*/README.md"))
HEADINGS = [
    "What it does",
    "Paper",
    "Idea",
    "Equations and functions",
    "Options",
    "When it helps and when not",
    "Memory and cost",
    "Measured",
    "Differences from the paper and from public code",
]


def sections(card):
    """Return the text under each second-level heading; code blocks have none."""
    text = re.sub(r"^```.*?^```$", "", card.read_text(), flags=re.DOTALL | re.MULTILINE)
    _, *parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_every_plugin_has_a_card():
    plugins = CARDS[0].parents[1].glob("*/pyproject.toml")
    assert [card.parent for card in CARDS] == sorted(path.parent for path in plugins)


@pytest.mark.parametrize("card", CARDS, ids=[card.parent.name for card in CARDS])
def test_cards_have_these_headings_in_this_order(card):
    found = sections(card)
    assert [heading for heading, _ in found] == HEADINGS
    assert [heading for heading, text in found if not text.strip()] == []
