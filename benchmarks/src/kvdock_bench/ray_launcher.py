"""Start workers as Ray actors, on this machine or in a running cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvdock_bench.cluster_address import check_address
from kvdock_bench.errors import BenchError
from kvdock_bench.jobs import Job
from kvdock_bench.placement import Place, Placement
from kvdock_bench.team import Died, Event, Finished, Raised, Ready, harmless
from kvdock_bench.worker import Facts, News, RemoteWorker, Setup


class Actor:
    """Hold a worker in a process that Ray started."""

    def meeting(self) -> str:
        """Return an address of this process for the others of its model."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def load(self, setup: Setup, place: Place) -> Facts:
        """Load the model."""
        try:
            self._worker = RemoteWorker(setup, place)
        except Exception as error:
            raise harmless(error) from error
        return self._worker.facts

    def run(self, job: Job) -> Iterator[News]:
        """Do a job."""
        try:
            yield from self._worker.run(job)
        except Exception as error:
            raise harmless(error) from error


class RayMember:
    """One actor and what it has not reported yet."""

    def __init__(self, actor: Any, group: PlacementGroup | None) -> None:
        self.actor, self.group = actor, group
        self.pending: Any = None
        """The facts on their way, or the stream of a job's news."""

    def give(self, job: Job) -> None:
        """Start a job."""
        self.pending = self.actor.run.options(num_returns="streaming").remote(job)

    def kill(self) -> None:
        """End the process and give its place back."""
        ray.kill(self.actor)
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def receive(self) -> Event:
        """Return the next event, which has to be there."""
        try:
            if isinstance(self.pending, ray.ObjectRef):
                event: Event = Ready(ray.get(self.pending))
                self.pending = None
            else:
                event = ray.get(next(self.pending))
        except StopIteration:
            self.pending = None
            return Finished()
        except RayActorError as error:
            return Died(_brief(error))
        except RayTaskError as error:
            cause = error.cause
            return Raised(cause if isinstance(cause, Exception) else harmless(error))
        except RayError as error:
            return Died(_brief(error))
        return event


class RayLauncher:
    """Start the workers of a placement as actors."""

    name = "ray"

    def __init__(self, setup: Setup, placement: Placement) -> None:
        self._setup = setup
        self._scratch: str | None = None
        if placement.ray_address is None:
            self._begin(placement)
        else:
            _join(placement.ray_address)
        self._placement = _fitted(placement, ray.cluster_resources())
        self.workers = self._placement.workers

    def start(self, number: int) -> Sequence[RayMember]:
        """Start the actors of one worker, in a placement group where they need several GPUs."""
        shape = self._placement
        needs = _needs(shape)
        group = None
        if len(needs) > 1 or shape.per_model > 1:
            group = placement_group(needs, strategy="PACK")
        actors = [self._actor(need, group, place) for place, need in enumerate(needs)]
        meeting = ray.get(actors[0].meeting.remote()) if len(actors) > 1 else ""
        members = [RayMember(actor, None if place else group) for place, actor in enumerate(actors)]
        # Ray numbers the GPUs of each process from 0
        if shape.processes > 1:
            devices = ("cpu" if shape.cpu else "cuda:0",) * shape.processes
        elif shape.cpu:
            devices = ("cpu",)
        else:
            devices = tuple(f"cuda:{index}" for index in range(shape.per_model))
        for member, place in zip(members, shape.places(devices, meeting), strict=True):
            member.pending = member.actor.load.remote(self._setup, place)
        return members

    def wait(self, members: Sequence[Any], timeout: float) -> list[tuple[Any, Event]]:
        """Return one event of each actor that has one."""
        waiting = [member for member in members if member.pending is not None]
        if not waiting:
            return []
        streams = [member.pending for member in waiting]
        ready, _ = ray.wait(streams, num_returns=1, timeout=timeout)
        if ready:  # others may be as far
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0)
        found = [member for member in waiting if any(member.pending is one for one in ready)]
        return [(member, member.receive()) for member in found]

    def close(self) -> None:
        """Leave the cluster; what this run started ends with it."""
        ray.shutdown()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _actor(self, need: dict[str, float], group: PlacementGroup | None, place: int) -> Any:
        options: dict[str, Any] = {
            "num_cpus": need.get("CPU", 0),
            "num_gpus": need.get("GPU", 0),
            # the team replaces what dies, and knows what was left to do
            "max_restarts": 0,
        }
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=place
            )
        return ray.remote(Actor).options(**options).remote()

    def _begin(self, placement: Placement) -> None:
        """Start Ray on this machine for this run alone."""
        self._scratch = tempfile.mkdtemp(prefix="kvdock-ray-")
        if placement.gpus:
            names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            known = [name.strip() for name in names.split(",") if name.strip()]
            chosen = [known[gpu] if known else str(gpu) for gpu in placement.gpus]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        # without it Ray leaves a file with a token in the user's home
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        _init(
            num_cpus=max(os.cpu_count() or 1, placement.workers * placement.processes),
            num_gpus=len(placement.gpus),
            include_dashboard=False,
            _temp_dir=self._scratch,
        )


def _init(**given: Any) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **given)


def _join(address: str) -> None:
    """Connect to a running cluster, or say within seconds that there is none."""
    check_address(address)
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchError(
            f"--ray-address {address}: {reason} Start one with `ray start --head`."
        ) from error


def _needs(placement: Placement) -> list[dict[str, float]]:
    """Return what each process of one worker takes."""
    if placement.cpu:
        return [{"CPU": 1}] * placement.processes
    if placement.processes > 1:
        return [{"GPU": 1}] * placement.processes
    # Ray counts in ten-thousandths; thirds must not add up to more than a GPU
    share = placement.per_model if placement.per_gpu == 1 else 10_000 // placement.per_gpu / 10_000
    return [{"GPU": share}]


def _fitted(placement: Placement, resources: dict[str, float]) -> Placement:
    """Return the placement with as many workers as the cluster serves, or refuse it."""
    kind = "CPU" if placement.cpu else "GPU"
    count = int(resources.get(kind, 0))
    each = placement.processes if placement.cpu else placement.per_model
    most = count // each * placement.per_gpu
    wanted = placement.workers or most
    if wanted == 0 or wanted > most:
        raise BenchError(
            f"{wanted or 'Even one'} worker{'s' * (wanted > 1)} of {each} {kind}"
            f"{'s' * (each > 1)} each {'are' if wanted > 1 else 'is'} more than the cluster has:"
            f" {count} {kind}s. Lower --workers or --gp_num"
            f"{'' if placement.cpu else ', or say --device cpu'}."
        )
    return dataclasses.replace(placement, workers=wanted)


def _brief(error: Exception) -> str:
    """Return the first line that says something about a dead actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower()]
    with contextlib.suppress(IndexError):
        return telling[0][:200]
    return (lines or [type(error).__name__])[0][:200]
