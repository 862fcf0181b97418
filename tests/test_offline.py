"""``VELOXLAB_OFFLINE=1`` forbids every socket but loopback, and sets the switches of libraries."""

import os
import socket
import subprocess
import sys

import pytest

from veloxlab.offline import OfflineError, _refuse

PROGRAM = """
import asyncio, os, socket, urllib.request
import veloxlab as vl
import huggingface_hub
from veloxlab.offline import OfflineError

def refused(attempt):
    try:
        attempt()
    except (OfflineError, urllib.error.URLError) as error:
        return "VELOXLAB_OFFLINE=1 allows" in str(error)
    return False

async def opened():
    await asyncio.open_connection("192.0.2.1", 80)

with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
print(all(map(refused, [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: urllib.request.urlopen("http://192.0.2.1/", timeout=1),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53)),
    lambda: socket.socket().bind(("", 0)),
    lambda: asyncio.run(opened()),
])))
try:
    vl.load("some-one/some-model")
except vl.InputError as error:
    print("could not be fetched" in str(error) or str(error))
print(huggingface_hub.constants.HF_HUB_OFFLINE)  # which has sockets of its own
"""


def test_only_this_machine_can_be_reached():
    env = os.environ | {"VELOXLAB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=env)
    assert ended.stdout.split() == ["True", "True", "True"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", b"localhost", "::1%lo"])
def test_addresses_of_this_machine_are_allowed(host):
    allowed = [
        ("socket.connect", (None, (host, 80))),
        ("socket.getaddrinfo", (host, 80)),
        ("socket.connect", (None, "/a/unix/socket")),
        ("open", ("192.0.2.1",)),
    ]
    assert [_refuse(event, given) for event, given in allowed] == [None] * len(allowed)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "", "0.0.0.0", "::", "localhost.example.org"])
def test_all_other_addresses_are_refused(host):
    for event, given in (("socket.connect", (None, (host, 80))), ("socket.getaddrinfo", (host, 80))):
        with pytest.raises(OfflineError, match="allows connections to this machine alone"):
            _refuse(event, given)


def test_without_the_switch_nothing_is_forbidden():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.bind(("", 0))
        assert found.getsockname()[1] > 0
