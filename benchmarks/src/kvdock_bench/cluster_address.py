"""Find out within seconds whether a Ray cluster answers at an address; Ray itself waits minutes."""

from __future__ import annotations

import socket

from kvdock_bench.errors import BenchError

_ANSWER_S = 3.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a gRPC client begins: HTTP/2's preface and empty settings."""


def check_address(address: str) -> None:
    """Raise where nothing at --ray-address speaks as Ray's server does; "auto" is Ray's to find."""
    if address.startswith("ray://"):
        raise BenchError(
            f"--ray-address {address}: pass the address of the cluster itself, as host:6379, and"
            " run on one of its machines; Ray's client protocol cannot stream answers."
        )
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise BenchError(f"--ray-address {address}: expected auto or host:port, as 10.0.0.1:6379.")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER_S) as connection:
            connection.settimeout(_ANSWER_S)
            connection.sendall(_HELLO)
            greeting = connection.recv(9)
    except OSError as error:
        raise BenchError(
            f"--ray-address {address}: nobody answers ({error}). Is the cluster up (`ray status`),"
            " and does its firewall let this machine in?"
        ) from error
    if len(greeting) < 4 or greeting[3] != _HELLO[-6]:
        raise BenchError(f"--ray-address {address}: something answers there, but it is not Ray.")
