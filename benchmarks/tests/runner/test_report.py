import re
import subprocess
import sys
from dataclasses import replace

import pytest

from kvdock_bench.errors import BenchError
from kvdock_bench.folder import find_run
from kvdock_bench.results import remake
from kvdock_bench.session import bench
from kvdock_bench.statistics import mean_of_groups, paired_difference, pareto_front
from kvdock_bench.tables import clock, length_name, size

pytestmark = pytest.mark.usefixtures("drawn")

NASTY = "<script>alert('x')</script> & </td> {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def finished(model_folder, config_file, tmp_path_factory):
    from kvdock_bench.arguments import Arguments

    output = tmp_path_factory.mktemp("runs")
    bench(
        Arguments(
            model_path=str(model_folder),
            cfg_path=str(config_file),
            device=("cpu",),
            limit=2,
            output_dir=output,
            save_tag="run",
            command=("kvdock", "bench", NASTY),
        )
    )
    return output / "run"


def test_the_report_stands_alone_and_escapes(finished):
    for path in (finished / "pred").glob("*/*.jsonl"):
        text = re.sub(
            r'"prediction":"[^"]*(\\"[^"]*)*"', f'"prediction":"{NASTY}"', path.read_text()
        )
        path.write_text(text)
    page = remake(finished).path.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]*)["']""", page.replace("xlink:", ""))
    assert set(links) == {"data:,"}
    assert "@import" not in page
    assert "<?xml" not in page
    assert page.count("<svg") == 5
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page


def test_remaking_changes_nothing(finished):
    first = remake(finished).path
    names = ["report.html", "summary.json", "summary.csv", "table.md", "plots/accuracy.svg"]
    before = [(finished / name).read_bytes() for name in names]
    remake(finished)
    assert [(finished / name).read_bytes() for name in names] == before
    assert first == finished / "report.html"


def test_a_run_is_found_by_path_or_tag(finished):
    assert find_run(str(finished), finished) == finished
    assert find_run("run", finished.parent) == finished
    with pytest.raises(BenchError, match="No run 'other'"):
        find_run("other", finished.parent)
    (finished.parent / "broken").mkdir(exist_ok=True)
    (finished.parent / "broken" / "run.json").write_text("{}")
    with pytest.raises(BenchError, match="does not describe a run"):
        remake(finished.parent / "broken")


def test_means_count_tasks_equally():
    mean = mean_of_groups([[1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert mean.value == 0.75
    # variance of the first group's mean is 0.25, of the second's 0
    assert mean.error == pytest.approx(0.25)
    assert mean.n == 6
    assert mean_of_groups([[1.0]]).error is None
    assert mean_of_groups([[], []]) is None


def test_paired_differences_have_an_interval():
    none = paired_difference([[[0.0] * 8]])
    assert (none.difference, none.low, none.high, none.n) == (0, 0, 0, 8)
    worse = paired_difference([[[-100.0] * 5 + [0.0] * 5], [[-100.0, 0.0] * 10, []]])
    assert worse.difference == -50
    assert -85 < worse.low < -50 < worse.high < -15
    assert worse.n == 30
    assert worse == paired_difference([[[-100.0] * 5 + [0.0] * 5], [[-100.0, 0.0] * 10, []]])
    assert paired_difference([[[]], []]) is None


def test_the_interval_covers_about_as_often_as_it_says():
    import numpy as np

    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        sample = rng.normal(5, 20, size=40)
        pair = paired_difference([[sample]], seed=trial)
        hits += pair.low <= 5 <= pair.high
    assert 176 <= hits <= 199


def test_pareto_front():
    points = [(10, 90), (5, 80), (5, 70), (7, 80), (2, 10), (2, 10)]
    assert pareto_front(points) == [4, 5, 1, 0]


def test_texts():
    assert [clock(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
    assert [size(b) for b in (None, 512, 1536, 5 * 2**30)] == ["", "512 B", "1.5 KiB", "5 GiB"]
    assert [length_name(n) for n in (500, 1024, 131072, 1536)] == ["500", "1K", "128K", "1536"]


def test_a_method_without_answers_leaves_blanks(arguments, failing_attach):
    stop = failing_attach(lambda call, rows: KeyboardInterrupt())
    bench(replace(arguments, acceleration=("fake",), limit=1), attach=stop)
    table = (arguments.output_dir / "run" / "table.md").read_text()
    assert "| 640 niah_multikey_1 |  |  |" in table
    assert "interrupted" in (arguments.output_dir / "run" / "report.html").read_text()


def test_no_pyplot_is_loaded():
    code = "import sys, kvdock_bench.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
