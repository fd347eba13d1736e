import pytest

from kvdock.errors import KVDockError
from kvdock_bench.errors import BenchError
from kvdock_bench.methods import FULL_CACHE, parse_methods, parse_settings
from kvdock_bench.plan import Plan, estimate_memory
from kvdock_bench.schema import BenchConfig
from kvdock_bench.shape import KVShape


def test_the_full_cache_comes_first_and_once():
    assert parse_methods([], [], []) == [FULL_CACHE]
    configs = parse_methods(["FAKE", "fa-ke"], ["64"], [])
    assert [config.label for config in configs] == ["Full cache", "Fake"]


def test_budgets_make_columns_and_options_reach_attach():
    configs = parse_methods(["Fake"], ["64", "25%", "1MiB"], ["Fake.window=16"])
    assert [c.label for c in configs[1:]] == ["Fake 64", "Fake 25%", "Fake 1MiB"]
    assert configs[1].attach_arguments() == {"methods": "fake", "budget": "64", "window": 16}
    assert len({config.method_id for config in configs}) == 4


def test_the_default_budget_is_part_of_the_configuration():
    assert parse_methods(["fake"], [], [])[1].budget == "2048"
    assert parse_methods(["fake"], ["2048tok"], [])[1] == parse_methods(["fake"], [], [])[1]


def test_compositions_qualify_their_options():
    arguments = parse_methods(["fake+fake"], ["64"], [])[1].attach_arguments()
    assert arguments == {"methods": "fake+fake", "budget": "64", "fake.window": 8}


def test_an_option_changes_the_id_and_its_default_does_not():
    default, same, other = (
        parse_methods(["fake"], ["64"], s)[1].method_id
        for s in ([], ["fake.window=8"], ["fake.window=9"])
    )
    assert default == same != other


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("null", None), ("max", "max"), ("0,1", [0, 1])],
)
def test_values_are_read(text, value):
    assert parse_settings([f"fake.x={text}"], {"fake"}) == {"fake": {"x": value}}


@pytest.mark.parametrize("text", ["", "fake", "fake=1", "fake.=1", ".x=1", "fake.x"])
def test_broken_settings_are_told(text):
    with pytest.raises(BenchError, match="--set"):
        parse_settings([text], {"fake"})


def test_a_wrong_budget_is_told_without_any_method():
    with pytest.raises(KVDockError, match="budget"):
        parse_methods([], ["-3"], [])


def test_memory_estimate():
    config = BenchConfig(task_names=("niah_single_1",), length=(1024,), num_samples=2)
    plan = Plan(config, tuple(parse_methods(["fake"], ["128", "50%", "1GiB"], [])))
    memory = estimate_memory(plan, KVShape(30, 3, 64, 64), 4, 1024)
    slot = 30 * 3 * 128 * 4
    assert memory.full == 1024 * slot
    assert list(memory.compressed.values()) == [1024 * slot, 128 * slot, 512 * slot, 1024 * slot]


def test_sliding_layers_hold_their_window():
    shape = KVShape(2, 1, 8, 8, sliding_layers=3, window=100)
    assert shape.full_bytes(1000, 2) == 32 * (2 * 1000 + 3 * 100)
    assert shape.full_bytes(50, 2) == 32 * 5 * 50
