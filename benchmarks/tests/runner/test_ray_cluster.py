"""What Ray really grants, on a cluster of two machines with two GPUs each, that exist by name only.

Ray counts GPUs without touching them; the workers put their models on the CPU instead.
"""

import contextlib
import json
import os
import secrets
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import pytest
import torch

from kvdock_bench.session import bench
from kvdock_bench.team import Team

ray = pytest.importorskip("ray")
launcher = pytest.importorskip("kvdock_bench.ray_launcher", exc_type=ImportError)

pytestmark = [pytest.mark.slow, pytest.mark.beside("snapkv", "streamingllm")]

METHODS = {"full", "snapkv", "streamingllm"}
PLANNED = len(METHODS) * 12
PATIENCE_S = 60


@pytest.fixture(scope="module", autouse=True)
def _quiet_ray():
    """Let Ray leave nothing in the home directory, and tell nobody."""
    names = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    names |= {"OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=machine)
    made.add_node(**machine)
    yield made
    made.shutdown()


@dataclass
class Watch:
    """What the driver saw of the cluster and of its workers."""

    loads: object
    methods: dict = field(default_factory=lambda: defaultdict(set))
    kill_one: bool = False
    free: float = -1.0
    groups: list = field(default_factory=list)
    given: Counter = field(default_factory=Counter)

    def loaded(self):
        """Return one entry for every time a model was read, in whatever process."""
        return [json.loads(line) for line in self.loads.read_text().splitlines()]

    def gpus(self):
        """Return how many living processes were given which GPUs of which machine."""
        living = [one for one in self.loaded() if is_alive(one["pid"])]
        return Counter((one["node"], one["visible"]) for one in living)


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def killed(loads):
    """Return the file that says that one process was killed, so that one more has to load."""
    return loads.with_name("killed")


def on_cpu(loads, processes):
    """Return an actor that loads on CPU, notes every load, and works while all are there."""

    # what the class names travels with it, but for functions of this module
    died = killed(loads)

    class OnCpu(launcher.Actor):
        def load(self, setup, place):
            from transformers import PreTrainedModel

            original = PreTrainedModel.from_pretrained.__func__

            def noted(cls, *args, **kwargs):
                node = ray.get_runtime_context().get_node_id()
                visible = os.environ.get("CUDA_VISIBLE_DEVICES")
                line = json.dumps({"pid": os.getpid(), "node": node, "visible": visible})
                with loads.open("a") as file:
                    file.write(line + "\n")
                return original(cls, *args, **kwargs)

            PreTrainedModel.from_pretrained = classmethod(noted)
            assert all(name.startswith("cuda:") for name in place.devices)
            return super().load(setup, replace(place, devices=("cpu",) * len(place.devices)))

        def run(self, job):
            while len(loads.read_text().splitlines()) < processes + died.exists():
                time.sleep(0.05)
            yield from super().run(job)

    return OnCpu


def groups():
    table = ray.util.placement_group_table().values()
    return [[*one["bundles"].values()] for one in table if one["state"] == "CREATED"]


def free_gpus():
    return ray.available_resources().get("GPU", 0.0)


def settled(read, wanted):
    """Return what `read` says once it is what is wanted, or after a while; Ray counts late."""
    until = time.monotonic() + PATIENCE_S
    while (found := read()) != wanted and time.monotonic() < until:
        time.sleep(0.2)
    return found


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Return a function that runs the benchmark under watch and tells what was seen."""

    def run(arguments, *, processes, free, kill_one=False):
        watch = Watch(tmp_path / "loads", kill_one=kill_one)
        watch.loads.touch()
        write, close = Team._write, Team.close

        def spied_write(team, worker, news):
            write(team, worker, news)
            names = {record.method_id.split("-")[0] for _, record in news.records}
            watch.methods[id(worker)] |= names
            if watch.kill_one:
                watch.kill_one = False
                killed(watch.loads).touch()
                os.kill(watch.loaded()[0]["pid"], signal.SIGKILL)

        def spied_close(team):
            watch.free, watch.groups = settled(free_gpus, free), groups()
            watch.given = watch.gpus()
            close(team)

        monkeypatch.setattr(Team, "_write", spied_write)
        monkeypatch.setattr(Team, "close", spied_close)
        monkeypatch.setattr(launcher, "Actor", on_cpu(watch.loads, processes))
        assert bench(arguments) == 0
        return watch

    return run


def predictions(folder):
    records = [
        json.loads(line)
        for path in sorted((folder / "pred").glob("*/*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    found = {record["key"]: (record["prediction"], record["error"]) for record in records}
    assert len(found) == len(records) == PLANNED
    return found


@pytest.fixture
def alone(compared, tmp_path):
    """The answers of this process alone."""
    bench(replace(compared, save_tag="alone", output_dir=tmp_path))
    return predictions(tmp_path / "alone")


@pytest.fixture
def compared(arguments):
    return replace(arguments, acceleration=("SnapKV", "StreamingLLM"), budget=("64",))


def check(watch, compared, alone):
    """Every answer is there and right, by workers that loaded once and know every method."""
    assert predictions(compared.output_dir / "run") == alone
    assert set(Counter(one["pid"] for one in watch.loaded()).values()) == {1}
    assert METHODS in watch.methods.values()
    assert settled(watch.gpus, {}) == {}


@pytest.mark.parametrize(
    ("flags", "free", "bundles", "given"),
    [
        ({"gp_num": "1/2", "workers": 3}, 2.5, [], [1, 2]),
        ({"gp_num": "2"}, 0.0, [[{"GPU": 2.0}]] * 2, [1, 1]),
        ({"gp_num": "2", "parallel": "tp", "workers": 1}, 2.0, [[{"GPU": 1.0}] * 2], [1, 1]),
    ],
    ids=["two models a GPU", "a model on two GPUs", "a model split over two GPUs"],
)
def test_what_a_cluster_grants(cluster, watched, compared, alone, flags, free, bundles, given):
    there = {"device": (), "ray_address": cluster.address, "torch_dtype": "float32"}
    dies = flags == {"gp_num": "2"}
    watch = watched(
        replace(compared, **there, **flags), processes=sum(given), free=free, kill_one=dies
    )
    assert watch.free == free
    assert watch.groups == bundles
    assert sorted(watch.given.values()) == given
    # all GPUs are taken there, so the third worker waited for those of the one that was killed
    assert len(watch.loaded()) == sum(given) + dies
    names = {visible for _, visible in watch.given}
    assert names == ({"0,1"} if dies else names & {"0", "1"})
    check(watch, compared, alone)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert settled(free_gpus, 4.0) == 4.0
        assert groups() == []
    finally:
        ray.shutdown()


def test_this_machine_lends_the_gpus_that_were_named(watched, compared, alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = {"device": ("1", "3"), "torch_dtype": "float32", "launcher": "ray"}
    watch = watched(replace(compared, **flags), processes=2, free=0.0)
    assert (watch.free, watch.groups) == (0.0, [])
    assert sorted(visible for _, visible in watch.given) == ["1", "3"]
    assert set(watch.given.values()) == {1}
    check(watch, compared, alone)
    assert not ray.is_initialized()
