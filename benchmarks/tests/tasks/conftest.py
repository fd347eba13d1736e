"""A small byte-level BPE tokenizer, trained on the shipped prose: no download, two seconds."""

from __future__ import annotations

import pytest

from kvdock_bench.config import BenchConfig, load_config
from kvdock_bench.fitting import Fitted, fit_sample
from kvdock_bench.haystack import load_haystack
from kvdock_bench.prompting import Prompter
from kvdock_bench.sources import TaskData, load_data
from kvdock_bench.tasks import get_task
from kvdock_bench.words import vocabulary

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join(vocabulary())
    bpe.train_from_iterator([words, words, *load_haystack("austen").take(20_000)], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="session")
def config() -> BenchConfig:
    return load_config("RULER_all")


@pytest.fixture(scope="session")
def data(config: BenchConfig) -> TaskData:
    return load_data(config.data)


@pytest.fixture(scope="session")
def prompter(tokenizer, config: BenchConfig) -> Prompter:
    return Prompter(tokenizer, config)


@pytest.fixture(scope="session")
def fit(prompter: Prompter, data: TaskData):
    def make(task: str, length: int = 1024, index: int = 0, seed: int = 42, **args) -> Fitted:
        return fit_sample(
            get_task(task),
            index=index,
            length=length,
            prompter=prompter,
            seed=seed,
            data=data,
            args=args or None,
        )

    return make
