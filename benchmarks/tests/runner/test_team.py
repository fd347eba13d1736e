"""The order of work and what follows a death, without any process."""

from dataclasses import dataclass, field

import pytest

from kvdock_bench.config import make_config
from kvdock_bench.errors import BenchError, WorkerLost
from kvdock_bench.jobs import Job, queue_of, whole_jobs
from kvdock_bench.methods import FULL_CACHE
from kvdock_bench.plan import Plan
from kvdock_bench.record import OOM
from kvdock_bench.team import Died, Finished, Raised, Ready, Team
from kvdock_bench.worker import Facts, News

FACTS = Facts({"model": "m"}, {}, {}, {})


@dataclass
class Answer:
    """What the team reads of a record."""

    method_id: str
    index: int
    length: int
    task: str
    error: str | None = None
    method: str = "Full cache"


@dataclass(eq=False)
class FakeMember:
    number: int
    events: list = field(default_factory=lambda: [Ready(FACTS)])
    jobs: list = field(default_factory=list)
    killed: bool = False
    script: object = None

    def give(self, job):
        self.jobs.append(job)
        self.events += self.script(self, job)

    def kill(self):
        self.killed = True


class FakeLauncher:
    name = "fake"

    def __init__(self, workers, script, ranks=1):
        self.workers, self.script, self.ranks = workers, script, ranks
        self.started, self.closed = [], False

    def start(self, number):
        made = [FakeMember(number, script=self.script) for _ in range(self.ranks)]
        self.started += made
        return made

    def wait(self, members, timeout):
        return [(member, member.events.pop(0)) for member in members if member.events]

    def close(self):
        self.closed = True


class Sink:
    def __init__(self):
        self.found = []

    def append(self, cell, record):
        self.found.append(record)

    def log(self, text):
        pass


class Reporter:
    def __init__(self):
        self.notes, self.samples = [], 0

    def advance(self, tokens, samples, label):
        self.samples += samples

    def note(self, text):
        self.notes.append(text)


def answers(job, until=None):
    made = [
        News([("cell", Answer(method, index, job.length, job.task, job.failure))])
        for method, indices in job.wanted.items()
        for index in indices
    ]
    return made[:until]


def well(member, job):
    return [*answers(job), Finished()]


def plan(lengths=(512, 1024), samples=4):
    config = make_config(
        {"task_names": ["niah_single_1", "vt"], "length": list(lengths), "num_samples": samples},
        "test",
    )
    return Plan(config, (FULL_CACHE,))


def queue(size=2, **shape):
    this = plan(**shape)
    return queue_of(this, lambda cell: list(range(this.config.num_samples)), size)


def run(launcher, jobs, **settings):
    sink, reporter = Sink(), Reporter()
    team = Team(launcher, sink, **settings)
    team.work(jobs, reporter)
    return sink.found, reporter


def places(found):
    return sorted((answer.length, answer.task, answer.index) for answer in found)


def test_alone_the_order_is_from_short_to_long():
    jobs = list(whole_jobs(plan(), lambda cell: [0, 2] if cell.length == 512 else []))
    assert jobs == [Job(512, name, {"full": (0, 2)}) for name in ("niah_single_1", "vt")]


def test_a_queue_holds_everything_once_and_the_longest_first():
    jobs = queue(size=3)
    assert [job.length for job in jobs] == [1024] * 2 + [512] * 2 + [1024] * 2 + [512] * 2
    assert [job.cost for job in jobs] == sorted((job.cost for job in jobs), reverse=True)
    assert sum(job.n_answers for job in jobs) == 16
    assert {job.wanted["full"] for job in jobs} == {(0, 1, 2), (3,)}


def test_everyone_works_and_every_answer_is_written_once():
    launcher = FakeLauncher(3, well)
    found, reporter = run(launcher, queue())
    assert len(found) == len(set(places(found))) == 16
    assert reporter.samples == 16
    assert all(member.jobs for member in launcher.started)
    assert max(len(member.jobs) for member in launcher.started) <= 4


def test_what_a_dead_worker_left_is_done_once_more_one_by_one():
    deaths = iter([True])

    def script(member, job):
        return [*answers(job, 1), Died("killed")] if next(deaths, False) else well(member, job)

    launcher = FakeLauncher(2, script)
    found, reporter = run(launcher, queue(size=4))
    assert len(found) == len(set(places(found))) == 16
    assert {answer.error for answer in found} == {None}
    assert len(launcher.started) == 3
    assert sum(member.killed for member in launcher.started) == 1
    assert reporter.notes == ["A worker died (killed); 3 answers of its job are left."]


def poisoned(reason):
    def script(member, job):
        bad = job.length == 1024 and job.task == "vt" and 2 in job.wanted["full"]
        if not bad or job.failure:
            return well(member, job)
        before = sum(index < 2 for index in job.wanted["full"])
        return [*answers(job, before), reason]

    return script


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (Died("killed"), "its worker died 2 times: killed"),
        (Raised(WorkerLost("broken")), "its worker died 2 times: broken"),
        (Raised(WorkerLost(OOM)), OOM),
    ],
)
def test_a_prompt_that_kills_twice_is_an_error_and_no_other_is(reason, error):
    launcher = FakeLauncher(2, poisoned(reason))
    found, _ = run(launcher, queue(size=4))
    assert len(found) == len(set(places(found))) == 16
    assert [(a.length, a.task, a.index, a.error) for a in found if a.error] == [
        (1024, "vt", 2, error)
    ]
    assert len(launcher.started) == 4


def test_when_nothing_gets_done_any_more_the_run_ends():
    launcher = FakeLauncher(2, lambda member, job: [Died("no GPU")])
    with pytest.raises(BenchError, match=r"Workers keep dying; the last one: no GPU.*--resume"):
        run(launcher, queue())
    assert len(launcher.started) < 12


def test_an_error_outside_the_answers_reaches_the_user():
    launcher = FakeLauncher(2, lambda member, job: [Raised(BenchError("no such method"))])
    with pytest.raises(BenchError, match="no such method"):
        run(launcher, queue())


def test_a_model_that_cannot_be_loaded_ends_the_run_at_once():
    launcher = FakeLauncher(2, well)
    launcher.start = lambda number: [FakeMember(number, events=[Died("killed by SIGKILL")])]
    with pytest.raises(BenchError, match="while it loaded the model: killed by SIGKILL"):
        run(launcher, queue())
    assert launcher.closed


def test_other_files_on_another_machine_are_refused():
    facts = iter([FACTS, Facts({"model": "other"}, {}, {}, {})])
    launcher = FakeLauncher(2, well)
    launcher.start = lambda number: [FakeMember(number, [Ready(next(facts))], script=well)]
    with pytest.raises(BenchError, match="different models or data"):
        run(launcher, queue())


def test_the_processes_of_a_split_model_answer_once_and_die_together():
    deaths = iter([False, True])  # the second process of the first worker

    def script(member, job):
        return [Died("killed")] if next(deaths, False) else well(member, job)

    launcher = FakeLauncher(1, script, ranks=2)
    found, _ = run(launcher, queue())
    assert len(found) == len(set(places(found))) == 16
    assert [member.killed for member in launcher.started] == [True, True, False, False]


def test_a_worker_without_a_sign_of_life_is_replaced(monkeypatch):
    hangs = iter([True])
    launcher = FakeLauncher(1, lambda m, job: [] if next(hangs, False) else well(m, job))
    found, reporter = run(launcher, queue(), patience=0.01)
    assert len(found) == 16
    assert "no sign of life" in reporter.notes[0]
