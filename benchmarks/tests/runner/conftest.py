import contextlib
import itertools
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvdock.hookspecs import hookimpl
from kvdock.method import Method, Paper
from kvdock.options import Options, option
from kvdock.registry import default_host
from kvdock_bench.arguments import Arguments
from kvdock_bench.haystack import load_haystack

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

CONFIG = """
task_names: [niah_single_1, niah_multikey_1]
length: [640, 768]
num_samples: 3
generation: {max_new_tokens: 6}
"""


@dataclass(frozen=True, slots=True)
class FakeOptions(Options):
    window: int = option(8, help="recent tokens", ge=1)


class FakePlugin:
    @hookimpl
    def kvdock_methods(self):
        paper = Paper("Fake", "none", "none")
        reference = "kvdock_fake_for_tests:FakeOptions"
        yield Method(
            id="fake",
            name="Fake",
            kind="eviction",
            factory=reference,
            options=reference,
            paper=paper,
        )


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def drawn():
    """Ask for the plots of the runs that a test makes."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Leave plots out where no test looks at them; drawing costs more than running."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("kvdock_bench.page.make_plots", lambda summary: [])


@pytest.fixture(autouse=True)
def fake_method(monkeypatch):
    """A method "fake" in the host of this process; `attach` is a stand-in of each test."""
    module = types.ModuleType("kvdock_fake_for_tests")
    module.FakeOptions = FakeOptions
    monkeypatch.setitem(sys.modules, module.__name__, module)
    plugin = FakePlugin()
    default_host().register(plugin)
    yield
    default_host().unregister(plugin)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # a wide spread, so that greedy choices are far from ties
            initializer_range=0.4,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(load_haystack("austen").take(10_000))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def arguments(model_folder, config_file, tmp_path) -> Arguments:
    return Arguments(
        model_path=str(model_folder),
        cfg_path=str(config_file),
        device=("cpu",),
        output_dir=tmp_path / "runs",
        save_tag="run",
        command=("kvdock", "bench", "--save_tag", "run", "--overwrite"),
    )


@dataclass
class FakeReport:
    bytes_after_prefill: int = 4096


class FakeDock:
    def report(self):
        return FakeReport()


@pytest.fixture
def plain_attach():
    return _plain_attach


@pytest.fixture
def failing_attach():
    return _failing_attach


@contextlib.contextmanager
def _plain_attach(model, methods, *, budget=None, **options):
    """Change nothing: answers equal the full cache's."""
    yield FakeDock()


def _failing_attach(fails):
    """Make `generate` raise what `fails(call, batch size)` returns, counting real calls only."""
    calls = itertools.count()

    @contextlib.contextmanager
    def attach(model, methods, *, budget=None, **options):
        original = model.generate

        def generate(**given):
            # the warm-up asks for two tokens
            if given["generation_config"].max_new_tokens > 2:
                error = fails(next(calls), len(given["input_ids"]))
                if error is not None:
                    raise error
            return original(**given)

        model.__dict__["generate"] = generate
        try:
            yield FakeDock()
        finally:
            del model.__dict__["generate"]

    return attach


@pytest.fixture
def with_fake(arguments) -> Arguments:
    return replace(arguments, acceleration=("Fake",), budget=("64",))
