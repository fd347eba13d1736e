"""The pages in a real browser, on a phone and on a desk: nothing fetched, cut or overlapping."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvdock_bench.diff import compare_runs
from kvdock_bench.diff_report import write_diff
from kvdock_bench.methods import FULL_CACHE, MethodConfig
from kvdock_bench.results import make_report
from kvdock_bench.runs import load_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (nox -s browser)")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("KVDOCK_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
RESULTS = Path(__file__).parents[2] / "results"
NASTY = "<script>document.title = 'x'</script><img src=http://127.0.0.1:9/x> " + "word" * 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, or its path in KVDOCK_CHROMIUM"),
]

MEASURE = """() => {
  const box = e => e.getBoundingClientRect();
  const texts = [];
  for (const svg of document.querySelectorAll('svg')) {
    const found = [...svg.querySelectorAll('text')].map(t => [t.textContent, box(t)]);
    found.forEach(([a, r], i) => found.slice(i + 1).forEach(([b, s]) => {
      const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left);
      const high = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      if (wide > 2 && high > 3) texts.push([a, b]);
    }));
  }
  const scrolls = e => e.closest('.scroll') !== null && !e.classList.contains('scroll');
  return {
    page: document.documentElement.scrollWidth,
    beyond: [...document.querySelectorAll('main *')].filter(
      e => !scrolls(e) && box(e).right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    svgs: [...document.querySelectorAll('svg')].map(s => [box(s).width, box(s).height]),
    cut: [...document.querySelectorAll('svg')].flatMap(s => [...s.querySelectorAll('text')].filter(
      t => box(t).right > box(s).right + 1 || box(t).left < box(s).left - 1
        || box(t).top < box(s).top - 1 || box(t).bottom > box(s).bottom + 1)
      .map(t => t.textContent)),
    overlaps: texts,
    smallest: Math.min(...[...document.querySelectorAll('svg text')].map(t => box(t).height), 99),
    ink: [...new Set([...document.querySelectorAll('svg text')].map(
      t => getComputedStyle(t).fill))],
    body: getComputedStyle(document.body).color,
    tables: [...document.querySelectorAll('table')].map(t => [t.rows.length, box(t).width]),
    shades: [...document.querySelectorAll('.heat td[style]')].map(
      t => [t.textContent, getComputedStyle(t).backgroundColor]),
  };
}"""


def method(name, budget="128"):
    return MethodConfig(f"{name} {budget}", (name.lower(),), budget, {name.lower(): {}})


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        # as root, as in containers, chromium refuses its sandbox
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


def real(make, making, large, to):
    return make_report([load_run(RESULTS / "smollm2-retrieval-cpu")], to)[0].path


def all_methods(make, making, large, to):
    return make_report([load_run(make(replace(large, samples=4, lengths=(512, 2048, 8192))))], to)[
        0
    ].path


def budgets(make, making, large, to):
    names = ("SnapKV", "H2O", f"name:{'option=value,' * 8}")
    columns = [method(name, budget) for budget in ("64", "128", "25%") for name in names]
    made = replace(making, methods=(FULL_CACHE, *columns), lengths=(512, 1024, 131072))
    return make_report([load_run(make(made))], to)[0].path


def two_runs(make, making, large, to):
    first = make(replace(making, prediction=NASTY), "a-first-run")
    runs = [first, make(replace(making, benchmark="Another", seed=1), "another")]
    other = make(replace(making, model="another-model-7B", seed=2), "b")
    return make_report([load_run(folder) for folder in [*runs, other]], to)[0].path


def diff(make, making, large, to):
    made = replace(large, samples=6, lengths=(512, 1024), errors=())
    first, second = load_run(make(replace(made, skill=()), "a")), load_run(make(made, "b"))
    return write_diff(to, compare_runs(first, second), [f"Software: {NASTY}"])


@pytest.mark.parametrize("write", [real, all_methods, budgets, two_runs, diff])
def test_a_page_renders_whole_and_alone(write, browser, make, making, large, tmp_path):
    page_file = write(make, making, large, tmp_path / "out")
    for width, scheme in ((390, "light"), (1280, "light"), (390, "dark")):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        told, asked = [], []
        page.on("console", lambda message, told=told: told.append(message.text))
        page.on("pageerror", lambda error, told=told: told.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.screenshot(path=tmp_path / f"{write.__name__}-{width}-{scheme}.png", full_page=True)
        found = page.evaluate(MEASURE)
        assert told == []
        assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.title() != "x"
        check(found, width, has_plots=write is not diff)
        context.close()


def check(found, width, *, has_plots):
    assert found["page"] <= width
    assert found["beyond"] == []
    assert found["tables"] and all(rows > 0 and wide > 50 for rows, wide in found["tables"])
    if not has_plots:
        return
    assert len(found["svgs"]) >= 5
    assert all(wide > 250 and high > 200 for wide, high in found["svgs"])
    assert found["cut"] == []
    assert found["overlaps"] == []
    assert found["smallest"] >= 8
    assert found["ink"] == [found["body"]]
    shades = dict(found["shades"])
    assert len(set(shades.values())) > 2
