"""Made-up people, companies and cities: questions whose answers no model can know beforehand."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product

import yaml

from kvdock_bench.tasks.base import SampleKey


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its accepted answers, the documents that hold them, and others in pieces."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    others: Iterator[list[str]]


@cache
def _raw_names() -> bytes:
    return (resources.files("kvdock_bench") / "resources" / "people.yaml").read_bytes()


@cache
def _names(kind: str) -> tuple[str, ...]:
    listed: str = yaml.safe_load(_raw_names())[kind]
    return tuple(listed.split(", "))


class SyntheticQuestions:
    """Ask about a person (one hop), or about the company a person works for (two hops)."""

    def __init__(self, hops: int) -> None:
        self.hops = hops
        self.label = f"offline substitute: synthetic {'one' if hops == 1 else 'two'}-hop documents"
        self.sha256 = hashlib.sha256(_raw_names()).hexdigest()

    def question(self, key: SampleKey) -> Question:
        """Return the key's question; no other document repeats its names or its answer."""
        rng = key.rng("people")
        people = [f"{first} {last}" for first, last in product(_names("first"), _names("last"))]
        rng.shuffle(people)
        return _one_hop(people, rng) if self.hops == 1 else _two_hops(people, rng)


def _one_hop(people: list[str], rng: random.Random) -> Question:
    city, job = rng.choice(_names("city")), rng.choice(_names("profession"))
    year = rng.randrange(1900, 2000)
    asked = people[0]
    text, answer = rng.choice(
        (
            (f"In which city was {asked} born?", city),
            (f"What is the profession of {asked}?", job),
            (f"In which year was {asked} born?", str(year)),
        )
    )
    gold = " ".join(_person(asked, city, job, year, rng))

    def others() -> Iterator[list[str]]:
        cities = [name for name in _names("city") if name != city]
        jobs = [name for name in _names("profession") if name != job]
        years = [number for number in range(1900, 2000) if number != year]
        for name in people[1:]:
            yield _person(name, rng.choice(cities), rng.choice(jobs), rng.choice(years), rng)

    return Question(text, (answer,), (gold,), others())


def _person(name: str, city: str, job: str, year: int, rng: random.Random) -> list[str]:
    facts = [
        f"The profession of {name} is {job}.",
        f"Friends know that {name.split()[0]} likes {rng.choice(_names('hobby'))}.",
    ]
    rng.shuffle(facts)
    return [f"{name} was born in the city of {city} in the year {year}.", *facts]


def _two_hops(people: list[str], rng: random.Random) -> Question:
    city = rng.choice(_names("city"))
    companies = [f"{last} {trade}" for last, trade in product(_names("last"), _names("trade"))]
    rng.shuffle(companies)
    asked, employer = people[0], companies[0]
    gold = (" ".join(_employee(asked, employer, rng)), " ".join(_company(employer, city, rng)))

    def others() -> Iterator[list[str]]:
        cities = [name for name in _names("city") if name != city]
        # Several people may share a company; the asked person's has nobody else.
        for position, name in enumerate(people[1:]):
            company = companies[1 + position % (len(companies) - 1)]
            yield _employee(name, company, rng)
            if position < len(companies) - 1:
                yield _company(company, rng.choice(cities), rng)

    text = f"In which city is the head office of the company that {asked} works for?"
    return Question(text, (city,), gold, others())


def _employee(name: str, company: str, rng: random.Random) -> list[str]:
    return [
        f"{name} works for the company {company}.",
        f"In the evening {name.split()[0]} enjoys {rng.choice(_names('hobby'))}.",
    ]


def _company(name: str, city: str, rng: random.Random) -> list[str]:
    return [
        f"The head office of {name} is in the city of {city}.",
        f"{name} was founded by a family and sells to {rng.choice(_names('customer'))}.",
    ]
