"""The devices that a load test looks at: those of this machine, when the server is here."""

from __future__ import annotations

import ipaddress
import socket

from mlsys_bench.hardware.devices import Nvml as Nvml
from mlsys_bench.hardware.devices import Rapl as Rapl


def is_local(address: str) -> bool:
    """Say whether a numeric address is one of this machine: only then can a socket be bound to it."""
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
    return True
