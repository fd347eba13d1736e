"""vLLM itself, on the embedded model: run by `nox -s vllm`."""

import json

import pytest

from kvdock_bench.arguments import Arguments
from kvdock_bench.errors import BenchError
from kvdock_bench.session import bench
from kvdock_bench.vllm.locate import find_python

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.filterwarnings("default")]

CONFIG = """
task_names: [niah_single_1, niah_single_2, niah_multikey_1, vt, qa_1]
length: 512
num_samples: 4
batch_size: 4
generation: {max_new_tokens: 24}
"""


@pytest.fixture
def python():
    try:
        return find_python(None)
    except BenchError:
        pytest.skip("needs vLLM's environment: nox -s vllm-env")


def test_greedy_answers_agree_with_the_full_cache_in_float32(python, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    arguments = Arguments(
        cfg_path=str(config),
        device=("cpu",),
        torch_dtype="float32",
        server=("transformers", "vllm"),
        vllm_python=str(python),
        output_dir=tmp_path,
        save_tag="run",
    )
    assert bench(arguments) == 0
    answers: dict[str, dict[str, str]] = {}
    for path in (tmp_path / "run" / "pred").glob("*/*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            answers.setdefault(record["method_id"], {})[record["prompt_sha"]] = record["prediction"]
    full, vllm = answers["full"], answers["vllm"]
    assert full.keys() == vllm.keys()
    assert len(full) == 20
    assert sum(full[prompt] == vllm[prompt] for prompt in full) >= 0.95 * len(full)
    assert "| Full cache | vLLM |" in (tmp_path / "run" / "table.md").read_text()
    assert "vllm" in json.loads((tmp_path / "run" / "run.json").read_text())["vllm"]["versions"]
