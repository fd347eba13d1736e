"""An address without a Ray cluster is told, without Ray and without a wait."""

import contextlib
import socket
import threading
from dataclasses import replace

import pytest

from kvdock_bench import cluster_address
from kvdock_bench.cluster_address import check_address
from kvdock_bench.errors import BenchError
from kvdock_bench.session import bench

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@contextlib.contextmanager
def server(answer):
    """Listen on a free port and answer one caller; None accepts nobody's words."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        done = threading.Event()

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    done.wait(10)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_nobody_listens():
    address = closed_port()
    with pytest.raises(BenchError, match=rf"--ray-address {address}: nobody answers.*ray status"):
        check_address(address)


def test_somebody_listens_and_is_silent(monkeypatch):
    monkeypatch.setattr(cluster_address, "_ANSWER_S", 0.2)
    with server(None) as address, pytest.raises(BenchError, match="nobody answers"):
        check_address(address)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ER", b""])
def test_something_else_listens(answer):
    with server(answer) as address, pytest.raises(BenchError, match="it is not Ray"):
        check_address(address)


def test_what_speaks_grpc_is_left_to_ray():
    with server(SETTINGS) as address:
        check_address(address)
    check_address("auto")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "pass the address of the cluster itself"),
        ("head", "expected auto or host:port"),
        (":6379", "expected auto or host:port"),
        ("head:70000", "expected auto or host:port"),
    ],
)
def test_a_malformed_address(address, message):
    with pytest.raises(BenchError, match=message):
        check_address(address)


def test_the_whole_command_says_so(arguments):
    pytest.importorskip("ray")
    address = closed_port()
    with pytest.raises(BenchError, match=f"--ray-address {address}: nobody answers"):
        bench(replace(arguments, device=(), ray_address=address))
    assert not list(arguments.output_dir.glob("*/pred/*/*.jsonl"))
