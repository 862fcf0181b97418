"""``VELOXLAB_OFFLINE=1``: this process cannot connect to another machine.

Python reports every use of a socket to audit hooks. Our hook refuses addresses of other machines. Libraries with
sockets outside Python, such as the Rust part of huggingface_hub, are switched off by their own variables.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from ipaddress import ip_address
from typing import Any

SWITCH = "VELOXLAB_OFFLINE"
_THEIRS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_OF_ADDRESS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"})  # socket, address
_OF_NAME = frozenset({"socket.getaddrinfo", "socket.gethostbyname"})  # host, …


class OfflineError(PermissionError):
    """A connection to another machine while `SWITCH` forbids it."""


def forbid_connections() -> None:
    """Refuse every connection to another machine if `SWITCH` is set; call it before libraries read their switches."""
    if is_set():
        os.environ.update(dict.fromkeys(_THEIRS, "1"))
        _hook()


def is_set() -> bool:
    """Return whether `SWITCH` is set."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


@cache  # an audit hook cannot be removed
def _hook() -> None:
    sys.addaudithook(_refuse)


def _refuse(event: str, given: tuple[Any, ...]) -> None:
    if event in _OF_ADDRESS:
        address = given[1]  # a text for families with names, such as AF_UNIX
        host = address[0] if isinstance(address, tuple) and address else None
    elif event in _OF_NAME:
        host = given[0]
    else:
        return
    if isinstance(host, str | bytes) and not _is_here(host if isinstance(host, str) else host.decode()):
        raise OfflineError(
            f"{SWITCH}=1 allows connections to this machine alone, and {host!r} is another address: unset it to use "
            "the network."
        )


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name, or nothing, which means all addresses
        return False
