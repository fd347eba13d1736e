"""A small byte-level BPE tokenizer, trained on the shipped prose: no download, two seconds."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join(vocabulary())
    bpe.train_from_iterator([words, words, *load_haystack("austen").take(20_000)], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return _wrapped(bpe)


@pytest.fixture(scope="session")
def foreign(config: BenchConfig) -> list[tuple[Prompter, int]]:
    """Prompters of two unlike tokenizers, each with a length that all tasks can fill."""
    return [(Prompter(_bytes(), config), 8192), (Prompter(_pieces(), config), 1024)]


def _bytes():
    """Every byte is a token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([], trainer)
    return _wrapped(raw)


def _pieces():
    """Unigram pieces, numbers in groups, blanks as marks; nothing begins the text."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=4000,
        special_tokens=SPECIAL,
        unk_token="</s>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    words = " ".join(vocabulary())
    raw.train_from_iterator([words, *load_haystack("austen").take(10_000)], trainer)
    return _wrapped(raw)


def _wrapped(raw: Tokenizer):
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
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
