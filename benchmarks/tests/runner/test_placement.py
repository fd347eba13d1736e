from pathlib import Path

import pytest

from kvdock_bench.errors import BenchError
from kvdock_bench.placement import Place, parse_placement

MEETING = Path("/x").as_uri()


def where(placement):
    return [placement.devices(worker) for worker in range(placement.workers)]


@pytest.mark.parametrize(
    ("devices", "gp_num", "expected"),
    [
        ([], None, [("cuda:0",)]),
        (["2"], None, [("cuda:2",)]),
        (["cuda:3"], "1", [("cuda:3",)]),
        (["0", "1", "3"], None, [("cuda:0",), ("cuda:1",), ("cuda:3",)]),
        (["0", "1", "2", "3"], "2", [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]),
        (["3", "1"], "2", [("cuda:3", "cuda:1")]),
        ([], "2", [("cuda:0", "cuda:1")]),
        (["0", "1"], "1/2", [("cuda:0",), ("cuda:1",), ("cuda:0",), ("cuda:1",)]),
        ([], "1/3", [("cuda:0",)] * 3),
    ],
)
def test_models_take_neighbouring_gpus(devices, gp_num, expected):
    placement = parse_placement(devices, gp_num, visible=4)
    assert where(placement) == expected
    assert placement.several_processes == (len(expected) > 1)


@pytest.mark.parametrize(("devices", "visible"), [(["cpu"], 4), ([], 0)])
def test_cpu(devices, visible):
    assert where(parse_placement(devices, visible=visible)) == [("cpu",)]
    two = parse_placement(devices, workers=2, visible=visible)
    assert where(two) == [("cpu",), ("cpu",)]
    assert two.several_processes


def test_tensor_parallelism_gives_every_device_a_process():
    placement = parse_placement(["0", "1"], "2", parallel="tp", visible=2)
    assert placement.workers == 1
    assert placement.several_processes
    assert placement.places(("cuda:0", "cuda:1"), MEETING) == [
        Place(("cuda:0",), 0, 2, MEETING),
        Place(("cuda:1",), 1, 2, MEETING),
    ]
    by_layers = parse_placement(["0", "1"], "2", visible=2)
    assert not by_layers.several_processes
    assert by_layers.places(("cuda:0", "cuda:1"), "") == [Place(("cuda:0", "cuda:1"))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": ["2"]}, "--device 2: torch sees 2 GPUs (0 to 1). Name one of them, or cpu."),
        ({"devices": ["0"], "visible": 0}, "--device 0: torch sees no GPU"),
        ({"devices": ["gpu"]}, "--device is 'gpu', expected cpu or the index of a GPU."),
        ({"devices": ["-1"]}, "expected cpu or the index"),
        ({"devices": ["cpu", "0"]}, "It stands alone"),
        ({"devices": ["0", "0"]}, "names GPU 0 twice"),
        ({"devices": ["0", "1"], "gp_num": "3"}, "--gp_num 3 on 2 devices"),
        ({"gp_num": "3"}, "--gp_num 3: torch sees 2 GPUs"),
        ({"devices": ["0"], "gp_num": "2"}, "--gp_num 2 on 1 device: "),
        ({"gp_num": "0/2"}, "--gp_num 0/2: expected GPUs per model"),
        ({"gp_num": "2/2"}, "--gp_num 2/2: expected"),
        ({"gp_num": "1/0"}, "--gp_num 1/0: expected"),
        ({"gp_num": "0"}, "--gp_num 0: expected"),
        ({"gp_num": "1.5"}, "--gp_num 1.5: expected"),
        ({"devices": ["cpu"], "gp_num": "1/2"}, "on CPU say --workers 2"),
        ({"devices": ["cpu"], "gp_num": "2"}, "--parallel tp"),
        ({"parallel": "tp"}, "--parallel tp needs several GPUs per model"),
        ({"parallel": "pp", "gp_num": "2"}, "--parallel pp: expected map"),
        ({"workers": 3}, "--device and --gp_num make 1 already"),
        ({"devices": ["cpu"], "workers": 0}, "--workers 0: expected 1 or more"),
        ({"devices": ["0"], "ray_address": "h:1"}, "a cluster chooses its own"),
    ],
)
def test_what_cannot_be_is_told(given, message):
    given = {"devices": [], "visible": 2, **given}
    with pytest.raises(BenchError) as caught:
        parse_placement(given.pop("devices"), given.pop("gp_num", None), **given)
    assert message in str(caught.value)
