"""What a worker asks of Ray, and how many of them a cluster serves; Ray itself is not started."""

import pytest

from kvdock_bench.errors import BenchError
from kvdock_bench.placement import parse_placement

launcher = pytest.importorskip("kvdock_bench.ray_launcher", exc_type=ImportError)


def shape(gp_num=None, *, devices=(), parallel="map", workers=None):
    return parse_placement(
        devices, gp_num, parallel=parallel, workers=workers, ray_address="head:6379", visible=0
    )


@pytest.mark.parametrize(
    ("placement", "needs"),
    [
        (shape(), [{"GPU": 1}]),
        (shape("1/2"), [{"GPU": 0.5}]),
        (shape("2"), [{"GPU": 2}]),
        (shape("2", parallel="tp"), [{"GPU": 1}] * 2),
        (shape(devices=["cpu"]), [{"CPU": 1}]),
        (shape("2", devices=["cpu"], parallel="tp"), [{"CPU": 1}] * 2),
    ],
)
def test_what_a_worker_asks_for(placement, needs):
    assert launcher._needs(placement) == needs


def test_thirds_of_a_gpu_fit_on_it():
    (need,) = launcher._needs(shape("1/3"))
    assert need["GPU"] >= 0.333 and 3 * need["GPU"] <= 1


@pytest.mark.parametrize(("gp_num", "most"), [(None, 5), ("1/2", 10), ("2", 2), ("1/3", 15)])
def test_a_cluster_of_five_gpus_serves(gp_num, most):
    resources = {"CPU": 4.0, "GPU": 5.0}
    assert launcher._fitted(shape(gp_num), resources).workers == most
    assert launcher._fitted(shape(gp_num, workers=1), resources).workers == 1
    with pytest.raises(BenchError, match=f"{most + 1} workers of .* more than the cluster has: 5"):
        launcher._fitted(shape(gp_num, workers=most + 1), resources)


def test_a_cluster_without_gpus_is_told():
    with pytest.raises(BenchError, match="Even one worker of 1 GPU .* 0 GPUs.*--device cpu"):
        launcher._fitted(shape(), {"CPU": 4.0})
