"""What the READMEs say of methods, numbers and files is what the records and results say."""

import json
import re
from xml.etree import ElementTree

import pytest
from blocks import FENCE, ROOT, pages
from measured import stored
from methods_table import READMES, plugin_ids, row, summaries

from kvdock import available

TEXTS = {language: (ROOT / name).read_text("utf-8") for language, name in READMES.items()}
RESULTS = stored.RESULTS
every_language = pytest.mark.parametrize("language", READMES)


@every_language
def test_every_plugin_has_its_row(language):
    assert sorted(summaries(TEXTS[language])) == plugin_ids(), "run: nox -s docs"


@every_language
@pytest.mark.parametrize("method", [id for id in available() if (ROOT / "plugins" / id).exists()])
def test_rows_equal_the_records_and_the_stored_results(method, language):
    said = summaries(TEXTS[language])[method]
    fresh = row(method, language, None if language == "en" else said)
    assert fresh in TEXTS[language].splitlines(), "run: nox -s docs"


@pytest.mark.versionless
def test_every_sentence_of_the_table_is_translated():
    said = summaries(TEXTS["zh"])
    assert [id for id, text in said.items() if not re.search(r"[一-鿿]", text)] == []


@pytest.mark.versionless
def test_both_readmes_have_the_same_structure():
    """The same headings by level, code, links, images and rows of tables, in the same order."""

    def structure(text):
        plain = FENCE.sub("", text)
        return {
            "headings": [len(marks) for marks in re.findall(r"^(#+) ", plain, re.MULTILINE)],
            "code": FENCE.findall(text),
            "points": len(re.findall(r"^- ", plain, re.MULTILINE)),
            "inline code": sorted(re.findall(r"`[^`\n]+`", plain)),
        }

    english, chinese = structure(TEXTS["en"]), structure(TEXTS["zh"])
    for part in english:
        assert chinese[part] == english[part], part
    links = {k: set(re.findall(r"\]\(([^)]+)\)", text)) for k, text in TEXTS.items()}
    assert links["en"] ^ links["zh"] == {"README.md", "README_zh.md"}


@pytest.mark.versionless
def test_numbers_in_the_text_are_the_stored_ones():
    def read(place):
        return json.loads((RESULTS / place).read_text())

    steps = {
        (run["system"], run["graph"]): run["ms_per_token"]
        for run in read("decode-graph-h100/speed_1_128k.json")["speed"]
    }
    whole = {
        run["system"]: run["total_s"] for run in read("decode-graph-h100/end_to_end_1.json")["runs"]
    }
    rows = read("storage-h100/kivi_capacity.json")["capacity"]
    light = stored.light_scores()
    sparse = {
        row["method"]: row.get("vs_full", {}).get("difference")
        for row in read("sparse-accuracy-smollm2-h100/summary.json")["rows"]
    }
    numbers = [
        f"{steps['snapkv', 'auto']:.1f}",
        f"{steps['snapkv', False]:.0f}",
        f"{steps['full', None]:.0f}",
        f"{whole['snapkv']:.1f}",
        f"{whole['full']:.1f}",
        *(f"{rows[name]['rows']}" for name in ("full", "kivi-4", "kivi-2")),
        *(f"{light[m, None]['mean']:.1f}" for m in ("full", "kivi:bits=4", "kivi:bits=2")),
        *(f"{light[m, None]['mean']:.1f}" for m in ("think:ratio=0.375", "think:ratio=0.5")),
        f"{sparse['xattention:dense_below=0,mode=compat']:+.1f}",
        f"{-sparse['flexprefill:dense_below=0,min_budget=256']:.1f}",
        f"{light['full', None]['n']}",
    ]
    for language, text in TEXTS.items():
        prose = re.sub(r"\]\([^)]*\)", "", text)
        absent = [
            n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d.]\d)", prose)
        ]
        assert absent == [], language


@pytest.mark.versionless
@pytest.mark.parametrize("name", ["long-prompt.svg", "accuracy.svg"])
def test_plots_show_the_stored_results(name, tmp_path):
    """The committed drawing says what a fresh one says: names, numbers and axes."""
    pytest.importorskip("kvdock_bench")
    import readme_plots

    def words(path):
        tree = ElementTree.fromstring(path.read_text("utf-8"))
        return [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]

    fresh = words(readme_plots.draw(name, tmp_path))
    assert words(readme_plots.IMAGES / name) == fresh, (
        "run: python benchmarks/scripts/readme_plots.py"
    )
    assert len(fresh) > 10


@pytest.mark.versionless
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_linked_and_named_files_exist(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    gone = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`(benchmarks/results/[\w/.-]+)`", text)
    assert gone + [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.versionless
def test_commands_that_the_text_promises():
    for text in TEXTS.values():
        assert "python -m pip install nox uv && nox -s demo" in text
        assert re.search(r"^nox$", text, re.MULTILINE)
