"""Every answer says how it was asked for."""

import json

from kvdock_bench.config import make_config
from kvdock_bench.methods import FULL_CACHE, MethodConfig
from kvdock_bench.protocol import make_protocol, protocol_id
from kvdock_bench.record import Record
from kvdock_bench.session import bench

SMALL = MethodConfig("Small", ("small",), "25%")


def asked(method=FULL_CACHE, task="vt", **keys):
    config = make_config(keys, "test")
    return make_protocol(config, task, method, template_id="chat:1", stops=[2])


def test_what_decides_an_answer_changes_the_id():
    plain = protocol_id(asked())
    others = [
        asked(max_length=100),
        asked(answer_prefix="none"),
        asked(generation={"stop": ["\n"]}),
        asked(no_template_tasks=["vt"]),
        {**asked(), "stop_ids": [3]},
    ]
    ids = {protocol_id(other) for other in others}
    assert len(ids) == len(others)
    assert plain not in ids


def test_the_budget_is_named_but_compares_with_the_full_cache():
    assert asked()["budget"] is None
    assert asked(SMALL)["budget"] == "share"
    assert protocol_id(asked()) == protocol_id(asked(SMALL))


def test_each_record_of_a_run_holds_its_protocol(arguments):
    assert bench(arguments) == 0
    lines = [
        line
        for path in (arguments.output_dir / "run" / "pred").glob("*/*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    records = [Record.from_line(line) for line in lines]
    assert len(records) == 12
    for record in records:
        assert record.protocol["template"].startswith("chat:")
        assert record.protocol_id == protocol_id(record.protocol)
        assert len(record.meta["depths"]) == {"niah_single_1": 1}.get(record.task, 4)


def test_a_record_of_version_1_has_no_protocol(arguments):
    assert bench(arguments) == 0
    path = next((arguments.output_dir / "run" / "pred").glob("*/*.jsonl"))
    content = json.loads(path.read_bytes().splitlines()[0])
    for name in ("protocol", "protocol_id", "meta"):
        del content[name]
    record = Record.from_line(json.dumps(content | {"schema_version": 1}).encode())
    assert (record.protocol, record.protocol_id) == ({}, "")
