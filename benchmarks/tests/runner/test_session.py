import json
import time
from dataclasses import replace

import pytest
import torch

from kvdock.errors import OptionError, UnknownMethodError
from kvdock_bench.errors import BenchError
from kvdock_bench.session import bench

CELLS = 2 * 2
SAMPLES = 3


def records(folder):
    return [
        json.loads(line)
        for path in sorted((folder / "run" / "pred").glob("*/*.jsonl"))
        for line in path.read_text().splitlines()
    ]


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_every_result(with_fake, plain_attach, capsys):
    assert bench(with_fake, attach=plain_attach) == 0
    folder = with_fake.output_dir / "run"
    names = ("run.json", "summary.json", "summary.csv", "table.md", "report.html")
    assert all((folder / name).stat().st_size > 100 for name in names)
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "accuracy.svg", "ms-per-token.svg", "pareto-640.svg", "pareto-768.svg", "ttft.svg"
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "Full cache" in shown
    assert "Fake" in shown
    assert str(folder / "report.html") in shown
    assert "offline data" in shown
    assert not [
        path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"
    ]


def test_records_hold_answers_times_and_memory(with_fake, plain_attach):
    bench(with_fake, attach=plain_attach)
    found = records(with_fake.output_dir)
    assert len({record["key"] for record in found}) == len(found) == 2 * CELLS * SAMPLES
    for record in found:
        assert 600 < record["n_prompt_tokens"] + 6 <= record["length"]
        assert 0 < record["timings"]["prefill_s"] <= record["timings"]["ttft_s"]
        assert record["timings"]["generate_s"] >= record["timings"]["ttft_s"]
        assert record["timings"]["tpot_s"] > 0
        assert record["memory"]["peak_alloc_bytes"] is None
        assert record["error"] is None
        assert record["score"] in (0, 1)
        assert record["finish_reason"] in ("stop", "length")
        # 2 layers, 2 KV heads, keys and values of 8 float32
        assert record["memory"]["kv_full_bytes"] == 256 * record["n_prompt_tokens"]
        if record["method_id"] == "full":
            assert record["memory"]["kv_bytes"] == record["memory"]["kv_full_bytes"]
        else:
            assert record["memory"]["kv_bytes"] == 4096


def test_methods_share_every_prompt(with_fake, plain_attach):
    bench(with_fake, attach=plain_attach)
    by_method = {}
    for record in records(with_fake.output_dir):
        place = (record["task"], record["length"], record["index"])
        by_method.setdefault(record["method_id"], {})[place] = record["prompt_sha"]
    full, fake = by_method.values()
    assert full == fake
    assert len(set(full.values())) == CELLS * SAMPLES


def test_a_used_folder_is_never_touched_without_a_flag(arguments, capsys):
    bench(replace(arguments, limit=1))
    before = (arguments.output_dir / "run" / "run.json").read_bytes()
    with pytest.raises(BenchError, match=r"--resume.*--overwrite"):
        bench(arguments)
    assert (arguments.output_dir / "run" / "run.json").read_bytes() == before
    with pytest.raises(BenchError, match="exclude each other"):
        bench(replace(arguments, resume=True, overwrite=True))
    bench(replace(arguments, limit=1, overwrite=True))
    assert len(list(arguments.output_dir.glob("run.old-*"))) == 1
    assert len(records(arguments.output_dir)) == CELLS


def test_resume_adds_samples_and_methods_and_repeats_nothing(arguments, plain_attach):
    bench(replace(arguments, limit=1))
    first = records(arguments.output_dir)
    more = replace(arguments, resume=True, acceleration=("fake",), budget=("64",))
    bench(more, attach=plain_attach)
    found = records(arguments.output_dir)
    assert len(found) == len({record["key"] for record in found}) == 2 * CELLS * SAMPLES
    assert [r for r in found if r["key"] in {f["key"] for f in first}] == first
    # a later session without the method keeps its column
    bench(replace(arguments, resume=True))
    assert records(arguments.output_dir) == found
    assert "| Full cache | Fake |" in (arguments.output_dir / "run" / "table.md").read_text()


def test_resume_refuses_other_settings(arguments, tmp_path):
    bench(replace(arguments, limit=1))
    other = tmp_path / "other.yaml"
    other.write_text("task_names: [niah_single_1]\nlength: 640\nseed: 7\n")
    with pytest.raises(BenchError, match="seed was 42, is 7"):
        bench(replace(arguments, cfg_path=str(other), resume=True))
    with pytest.raises(BenchError, match="model was"):
        bench(replace(arguments, torch_dtype="bfloat16", resume=True))


def test_out_of_memory_is_a_dash_and_the_run_goes_on(with_fake, failing_attach, capsys):
    def fails(call, rows):
        return torch.OutOfMemoryError("CUDA out of memory") if call == 0 else None

    assert bench(with_fake, attach=failing_attach(fails)) == 0
    table = (with_fake.output_dir / "run" / "table.md").read_text()
    assert "| 640 niah_single_1 | 0.00 ±0.0 | - |" in table
    assert "| 640 niah_multikey_1 | 0.00 ±0.0 | 0.00 ±0.0 ≈ |" in table
    assert "| Average | 0.00 ±0.0 | - |" in table
    assert "- out of memory" in table
    found = [r for r in records(with_fake.output_dir) if r["error"] == "oom"]
    assert len(found) == 1
    assert found[0]["score"] is None
    # it stays: a resumed run does not try again
    bench(replace(with_fake, resume=True), attach=failing_attach(fails))
    assert len(records(with_fake.output_dir)) == 2 * CELLS * SAMPLES


def test_out_of_memory_halves_the_batch(with_fake, failing_attach):
    batched = replace(with_fake, batch_size="3")

    def fails(call, rows):
        return RuntimeError("DefaultCPUAllocator: not enough memory") if rows > 1 else None

    assert bench(batched, attach=failing_attach(fails)) == 0
    found = records(with_fake.output_dir)
    assert {r["batch_size"] for r in found if r["method_id"] != "full"} == {1}
    assert {r["batch_size"] for r in found if r["method_id"] == "full"} == {3}
    assert all(r["error"] is None for r in found)


def test_auto_halves_until_it_fits_and_remembers(with_fake, failing_attach):
    tried = []

    def fails(call, rows):
        tried.append(rows)
        return torch.OutOfMemoryError("CUDA out of memory") if rows > 1 else None

    auto = replace(with_fake, batch_size="auto")
    assert bench(auto, attach=failing_attach(fails)) == 0
    found = records(with_fake.output_dir)
    assert {r["batch_size"] for r in found if r["method_id"] == "full"} == {3}
    assert {r["batch_size"] for r in found if r["method_id"] != "full"} == {1}
    assert all(r["error"] is None for r in found)
    assert len(found) == len({r["key"] for r in found}) == 2 * CELLS * SAMPLES
    # one cell learns it for all longer ones: 3, then 2 and its halves
    assert tried[:2] == [3, 2]
    assert tried[2:] == [1] * CELLS * SAMPLES


def test_an_answer_that_takes_too_long_is_an_error_and_no_other_is(with_fake, failing_attach):
    def fails(call, rows):
        if call == 4:
            time.sleep(30)

    limited = replace(with_fake, batch_size="1", time_limit=4.0)
    begun = time.monotonic()
    assert bench(limited, attach=failing_attach(fails)) == 1
    assert time.monotonic() - begun < 25
    found = [r for r in records(with_fake.output_dir) if r["error"] is not None]
    assert [r["error"] for r in found] == ["TimeLimit: no answer within 4 s"]
    assert found[0]["score"] is None
    assert len(records(with_fake.output_dir)) == 2 * CELLS * SAMPLES
    with pytest.raises(BenchError, match="--time_limit 0: expected seconds above 0"):
        bench(replace(with_fake, time_limit=0.0, overwrite=True))


def test_a_slow_batch_is_tried_in_halves(with_fake, failing_attach):
    def fails(call, rows):
        if call == 0:
            time.sleep(60)

    limited = replace(with_fake, batch_size="2", time_limit=2.0, limit=2)
    assert bench(limited, attach=failing_attach(fails)) == 0
    sizes = [r["batch_size"] for r in records(with_fake.output_dir) if r["method_id"] != "full"]
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2, 2, 2]


def test_max_length_cuts_every_prompt(arguments):
    bench(replace(arguments, max_length="500", limit=1))
    found = records(arguments.output_dir)
    assert {record["n_prompt_tokens"] for record in found} == {500}
    assert {record["protocol"]["truncation"] for record in found} == {"middle:500"}
    with pytest.raises(BenchError, match="max_length"):
        bench(replace(arguments, max_length="600", limit=1, resume=True))


def test_any_other_error_is_told_and_tried_again_on_resume(with_fake, failing_attach, capsys):
    def fails(call, rows):
        return ValueError("a <b>bad</b> kernel") if call == 1 else None

    assert bench(with_fake, attach=failing_attach(fails)) == 1
    folder = with_fake.output_dir / "run"
    assert "a <b>bad</b> kernel" in (folder / "errors.log").read_text()
    assert "| 640 niah_single_1 | 0.00 ±0.0 | error |" in (folder / "table.md").read_text()
    assert "errors.log" in capsys.readouterr().out
    never = failing_attach(lambda call, rows: None)
    assert bench(replace(with_fake, resume=True), attach=never) == 0
    table = (folder / "table.md").read_text()
    assert "| error |" not in table
    assert "| Length | Full cache | Fake |\n" in table


def test_ctrl_c_keeps_what_is_finished(with_fake, failing_attach, capsys):
    def fails(call, rows):
        return KeyboardInterrupt() if call == 4 else None

    assert bench(with_fake, attach=failing_attach(fails)) == 130
    found = records(with_fake.output_dir)
    assert len(found) == 6 + 4
    folder = with_fake.output_dir / "run"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert "(n=4)" in (folder / "table.md").read_text()
    shown = capsys.readouterr().out
    assert "kvdock bench --save_tag run --resume" in shown
    assert bench(replace(with_fake, resume=True), attach=failing_attach(lambda c, r: None)) == 0
    assert records(with_fake.output_dir)[: len(found)] != []
    assert len(records(with_fake.output_dir)) == 2 * CELLS * SAMPLES


def test_unwritable_folder_is_told_before_the_model_is_loaded(arguments, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    wrong = replace(arguments, output_dir=blocked, model_path="/nowhere")
    with pytest.raises(BenchError, match=r"Cannot (read|write).*file"):
        bench(wrong)


def test_two_processes_never_write_one_folder(arguments):
    from kvdock_bench.folder import locked

    bench(replace(arguments, limit=1))
    with locked(arguments.output_dir / "run"):
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(BenchError, match="Another process"):
                bench(replace(arguments, **flags))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acceleration": ("NoSuch",)}, "pip install kvdock-nosuch"),
        ({"budget": ("12parsecs",), "acceleration": ("fake",)}, "parsecs"),
        ({"budget": ("0",), "acceleration": ("fake",)}, "at least 1"),
        ({"settings": ("fake.windw=3",), "acceleration": ("fake",)}, "Did you mean 'window'"),
        ({"settings": ("fake.window=0",), "acceleration": ("fake",)}, ">= 1"),
        ({"settings": ("other.window=3",), "acceleration": ("fake",)}, "not in --acceleration"),
        ({"settings": ("window=3",), "acceleration": ("fake",)}, "method.option=value"),
        ({"torch_dtype": "torch.int8"}, "float32, float16, bfloat16"),
        ({"torch_dtype": "__import__('os')"}, "float32, float16, bfloat16"),
        ({"device": ("cpu", "0")}, "stands alone"),
        ({"device": ("gpu",)}, "cpu or the index"),
        ({"device": ("99",)}, "torch sees"),
        ({"save_tag": "../out"}, "no path"),
        ({"save_tag": ".."}, "no path"),
        ({"model_path": "/no/such/folder"}, "does not exist"),
        ({"cfg_path": "RULLER"}, "RULER"),
        ({"batch_size": "0"}, "batch_size"),
        ({"batch_size": "many"}, "batch_size"),
        ({"max_length": "x"}, "max_length"),
        ({"template": "missing.jinja"}, "template"),
    ],
)
def test_wrong_values_are_told(arguments, changes, message):
    from kvdock.errors import KVDockError

    with pytest.raises(KVDockError) as caught:
        bench(replace(arguments, **changes))
    assert message in str(caught.value)


def test_methods_are_checked_before_anything_runs(arguments):
    with pytest.raises((UnknownMethodError, OptionError)):
        bench(replace(arguments, acceleration=("nosuch",)))
    assert not arguments.output_dir.exists()


def test_dry_run_prints_the_plan_and_makes_nothing(with_fake, capsys):
    assert bench(replace(with_fake, dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert "8 cells, 24 answers" in shown
    # 256 bytes a token
    assert "640: Full cache 160 KiB, Fake 16 KiB" in shown
    assert not with_fake.output_dir.exists()
    bench(replace(with_fake, dry_run=True, budget=()))
    assert "compresses nothing" in capsys.readouterr().out
