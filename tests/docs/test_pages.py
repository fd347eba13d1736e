"""The index of decisions is complete, and the table of versions is the environments'."""

import ast
import re

import pytest
from blocks import ROOT

from kvdock.testing_models import FAMILIES

pytestmark = pytest.mark.versionless

COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text("utf-8")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_decision_is_indexed_by_its_title():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[(\d{4})\]\((\d{4}-[\w-]+\.md)\) \| (.*) \|$", index, re.MULTILINE)
    records = sorted(folder.glob("0*.md"))
    assert [row[1] for row in rows] == [record.name for record in records]
    for (number, name, title), record in zip(rows, records, strict=True):
        assert name.startswith(number)
        text = record.read_text("utf-8")
        assert text.startswith(f"# {number} {title}\n")
        parts = re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE)
        assert parts[0] == "Context" and "Decision" in parts and "Consequence" in parts, name


def test_versions_are_those_of_the_environments():
    rows = [cells(line) for line in COMPATIBILITY.splitlines() if re.match(r"\| \w+ \| \d", line)]
    found = {row[0]: (row[1], row[2]) for row in rows}
    pinned = {}
    for path in ROOT.glob("envs/*/requirements.in"):
        exact = dict(re.findall(r"^([\w-]+)==([\d.]+)", path.read_text(), re.MULTILINE))
        pinned[path.parent.name] = exact["torch"], exact["transformers"]
    assert found == pinned


def test_families_are_those_of_the_contract_suite():
    [head] = [line for line in COMPATIBILITY.splitlines() if line.startswith("| environment")]
    assert cells(head)[4:] == list(FAMILIES)


def test_other_families_are_those_of_the_cores_tests():
    tree = ast.parse((ROOT / "core" / "tests" / "torch" / "test_families.py").read_text())
    [table] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES"
    ]
    tested = sorted(ast.literal_eval(key) for key in table.keys)
    _, special = COMPATIBILITY.split("| family | what is special |\n|---|---|\n")
    listed = re.findall(r"^\| (\w+) \|", special, re.MULTILINE)
    assert listed == tested


def test_captured_types_are_named():
    source = (ROOT / "core" / "src" / "kvdock" / "decode.py").read_text()
    [names] = re.findall(r"^VERIFIED = (\(.*\))$", source, re.MULTILINE)
    assert f"step is verified: {', '.join(ast.literal_eval(names))}." in COMPATIBILITY
