import pytest
import torch
from transformers import DynamicCache

from kvdock_bench.generate import Generator, Settings, cache_bytes
from kvdock_bench.models import load


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def generator(loaded):
    return Generator(loaded.model, loaded.tokenizer, loaded.shape, loaded.item_bytes)


@pytest.fixture(scope="module")
def prompts():
    source = torch.Generator().manual_seed(1)
    return [torch.randint(2, 500, (n,), generator=source).tolist() for n in (40, 9, 33, 40)]


def test_a_batch_answers_like_single_prompts(generator, prompts):
    settings = Settings(max_new_tokens=16)
    batch = generator.run(prompts, settings, None)
    single = [generator.run([prompt], settings, None)[0] for prompt in prompts]
    assert [answer.text for answer in batch] == [answer.text for answer in single]
    assert [answer.n_new_tokens for answer in batch] == [a.n_new_tokens for a in single]


def test_generation_equals_plain_transformers(generator, loaded, prompts):
    plain = loaded.model.generate(
        torch.tensor([prompts[0]]), max_new_tokens=16, do_sample=False, pad_token_id=1
    )
    text = loaded.tokenizer.decode(plain[0, len(prompts[0]) :], skip_special_tokens=True)
    assert generator.run([prompts[0]], Settings(max_new_tokens=16), None)[0].text == text


def test_times_and_bytes_add_up(generator, prompts):
    answers = generator.run(prompts, Settings(max_new_tokens=5), None)
    for answer in answers:
        times = answer.timings
        assert 0 < times.prefill_s <= times.ttft_s
        assert times.tpot_s * 4 == pytest.approx(times.decode_s)
        assert times.generate_s * 4 == pytest.approx(times.ttft_s + times.decode_s)
        assert answer.memory.peak_alloc_bytes is None
        # 40 columns for every row, since the plain cache holds its padding
        assert answer.memory.kv_bytes == 256 * 40
    assert [a.memory.kv_full_bytes for a in answers] == [256 * len(p) for p in prompts]
    single = generator.run(prompts[:1], Settings(max_new_tokens=1), None)[0]
    assert single.timings.tpot_s is None
    assert single.memory.kv_ratio == 1


def test_stop_words_cut_the_text(generator, prompts):
    whole = generator.run(prompts[:1], Settings(max_new_tokens=12), None)[0]
    word = whole.text[4:7]
    cut = generator.run(prompts[:1], Settings(max_new_tokens=12, stop=(word,)), None)[0]
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish_reason == "stop"


def test_views_count_as_what_they_keep_alive():
    cache = DynamicCache()
    whole = torch.zeros(1, 2, 100, 8)
    cache.update(whole[:, :, :10], torch.zeros(1, 2, 10, 8), 0)
    cache.layers[0].keys = whole[:, :, :10]
    assert cache_bytes(cache) == 4 * (1600 + 160)
