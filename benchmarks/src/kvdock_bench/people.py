"""Made-up people, companies and cities: questions whose answers no model can know beforehand."""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from kvdock_bench.tasks.base import SampleKey

_FIRST = (
    "Adela Bruno Carla Dario Edith Felix Greta Hugo Irene Jonas Katja Lionel Marta Nils Olga Pablo "
    "Quentin Rosa Stefan Tilda Ulrich Vera Wanda Xavier Yusuf Zelda Anton Bianca Cedric Daphne Emil "
    "Flora Gideon Helga Ivan Judith Konrad Lucia Magnus Nadia"
).split()
_LAST = (
    "Abernath Bellweather Castellan Drummond Eastlake Fairbrook Galloway Hawthorne Ingersoll Jessop "
    "Kingsford Lockridge Merriweather Northcote Oakhurst Pemberton Quillfeather Ravensdale Standish "
    "Thornbury Underhill Vandermeer Whitlock Yarborough Zimmerlin Ashgrove Birchwood Coldwater "
    "Dunmore Elderwick Foxworthy Greenhalgh Holloway Ironside Kettlewell Larkspur Moorcroft "
    "Nightingale Ormsby Prescott Rutherglen Silverton Tillinghast Upchurch Ventnor Westerfield "
    "Wolverton Yelverton"
).split()
_CITIES = (
    "Aldermere Brightholm Caskerton Dunvarra Elmsgate Farrowick Glenhaven Harrowdale Inverloch "
    "Jasperton Kelbridge Lowenfall Marrowby Norvale Ottersea Penwick Queensmarsh Rookhaven Stonewell "
    "Tarnbrook Umberfield Vexmoor Wyndcliff Yarrowgate Zephyrton Ashcombe Bellmoor Cloverton "
    "Driftwood Eversand Fernhollow Goldcrest Hollowpine Icemarsh Junewater Knollwood Lakemoor "
    "Mistvale Nettlewick Oldbarrow"
).split()
_PROFESSIONS = (
    "carpenter surgeon architect beekeeper chemist cartographer librarian blacksmith violinist baker "
    "geologist translator astronomer plumber sculptor pharmacist gardener electrician journalist "
    "watchmaker photographer dentist tailor botanist"
).split()
_HOBBIES = (
    "collecting old maps|long walks by the river|playing chess at the cafe|growing roses|"
    "repairing bicycles|reading detective stories|singing in a small choir|painting landscapes|"
    "keeping a diary of the weather|cooking for friends"
).split("|")
_TRADES = (
    "Glass Textiles Shipping Bakeries Instruments Ceramics Printing Engines Seeds Optics".split()
)
_GOODS = (
    "customers in many countries|schools and hospitals|small shops of the region|"
    "farmers and gardeners|museums and theatres|builders and engineers"
).split("|")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its accepted answers, the documents that hold them, and others in pieces."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    others: Iterator[list[str]]


class SyntheticQuestions:
    """Ask about a person (one hop), or about the company a person works for (two hops)."""

    def __init__(self, hops: int) -> None:
        self.hops = hops
        self.label = f"offline substitute: synthetic {'one' if hops == 1 else 'two'}-hop documents"
        source = inspect.getsource(sys.modules[__name__])
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()

    def question(self, key: SampleKey) -> Question:
        """Return the key's question; no other document repeats its names or its answer."""
        rng = key.rng("people")
        people = [f"{first} {last}" for first, last in product(_FIRST, _LAST)]
        rng.shuffle(people)
        return _one_hop(people, rng) if self.hops == 1 else _two_hops(people, rng)


def _one_hop(people: list[str], rng: random.Random) -> Question:
    city, job = rng.choice(_CITIES), rng.choice(_PROFESSIONS)
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
        cities = [name for name in _CITIES if name != city]
        jobs = [name for name in _PROFESSIONS if name != job]
        years = [number for number in range(1900, 2000) if number != year]
        for name in people[1:]:
            yield _person(name, rng.choice(cities), rng.choice(jobs), rng.choice(years), rng)

    return Question(text, (answer,), (gold,), others())


def _person(name: str, city: str, job: str, year: int, rng: random.Random) -> list[str]:
    facts = [
        f"The profession of {name} is {job}.",
        f"Friends know that {name.split()[0]} likes {rng.choice(_HOBBIES)}.",
    ]
    rng.shuffle(facts)
    return [f"{name} was born in the city of {city} in the year {year}.", *facts]


def _two_hops(people: list[str], rng: random.Random) -> Question:
    city = rng.choice(_CITIES)
    companies = [f"{last} {trade}" for last, trade in product(_LAST, _TRADES)]
    rng.shuffle(companies)
    asked, employer = people[0], companies[0]
    gold = (" ".join(_employee(asked, employer, rng)), " ".join(_company(employer, city, rng)))

    def others() -> Iterator[list[str]]:
        cities = [name for name in _CITIES if name != city]
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
        f"In the evening {name.split()[0]} enjoys {rng.choice(_HOBBIES)}.",
    ]


def _company(name: str, city: str, rng: random.Random) -> list[str]:
    return [
        f"The head office of {name} is in the city of {city}.",
        f"{name} was founded by a family and sells to {rng.choice(_GOODS)}.",
    ]
