"""Every method card answers the same questions, in order, and quotes the stored results."""

import re
from pathlib import Path

import pytest
from measured import stored

pytestmark = pytest.mark.versionless

CARDS = sorted(Path(__file__).resolve().parents[2].glob("plugins/*/README.md"))
IDS = {card.parent.name for card in CARDS}
SCORES = stored.light_scores()
RATIOS = ("0.375", "0.5")
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


def measured_text(id):
    text = dict(sections(CARDS[0].parents[1] / id / "README.md"))["Measured"]
    return " ".join(text.split())


@pytest.mark.parametrize("id", sorted(stored.long_prompts()))
def test_long_prompts_are_quoted_as_stored(id):
    run, text = stored.long_prompts()[id], measured_text(id)
    overhead = f"{100 * run.overhead:+.1f} %".replace("-", "−")
    assert f"time to first token {overhead}" in text
    assert f"cache {run.kv_gib:.2f} GiB instead of {run.kv_full_gib:.1f}" in text
    assert f"peak memory {run.peak_gib:.1f} GiB instead of {run.peak_full_gib:.1f}" in text


@pytest.mark.parametrize("id", sorted({name for name, budget in SCORES if budget and name in IDS}))
def test_scores_are_quoted_as_stored(id):
    first, *rest = [SCORES[id, budget] for budget in (64, 128, 256)]
    text = measured_text(id)
    assert f"it scores {first['mean']:.1f} % at 64 slots" in text
    assert all(f"{row['mean']:.1f} % at {row['budget']}" in text for row in rest)
    assert f"full cache {SCORES['full', None]['mean']:.1f} %" in text
    assert f"n = {first['n']}" in text


@pytest.mark.parametrize("id", sorted(IDS & set(stored.step_ms()) - {"flexprefill", "xattention"}))
def test_captured_steps_are_quoted_as_stored(id):
    assert f"takes {stored.step_ms()[id]:.1f} ms" in measured_text(id)


@pytest.mark.parametrize(
    ("id", "methods"),
    [
        ("kivi", ("kivi:bits=4", "kivi:bits=2")),
        ("think", ("think:ratio=0.375", "think:ratio=0.5")),
    ],
)
def test_scores_without_a_budget_are_quoted_as_stored(id, methods):
    text = measured_text(id)
    for method in methods:
        lengths = SCORES[method, None]["lengths"]
        assert all(f"{lengths[n]['mean']:.1f}" in text for n in ("1024", "2048"))


def test_savings_are_quoted_as_stored():
    text = measured_text("think")
    assert all(f"{stored.think_saving(ratio):.0%}".replace("%", " %") in text for ratio in RATIOS)
    text = measured_text("kivi")
    assert all(f"{stored.row_gib(name):.2f}" in text for name in ("full", "kivi-4", "kivi-2"))


@pytest.mark.parametrize("id", ["flexprefill", "xattention"])
def test_whole_prompts_are_quoted_as_stored(id):
    text = measured_text(id)
    seconds = re.search(r"131 072 tokens take ([\d.]+) s .*? against ([\d.]+) s of dense", text)
    mine, dense = map(float, seconds.groups())
    assert mine / dense - 1 == pytest.approx(stored.sparse_prompt(id), abs=0.002)
