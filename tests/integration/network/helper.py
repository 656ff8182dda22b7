"""A process that has `Networks` and nothing else of the helper, and does with them what a socket tells it to."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import asdict
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from vmherd.model.errors import VmherdError
from vmherd.model.machine import KernelBoot, Machine, Nic, NicBackend
from vmherd.model.network import Network
from vmherd.qemu.network.leftovers import teardown
from vmherd.qemu.network.networks import Networks
from vmherd.qemu.network.rules import Port

MESSAGE_MAX_BYTES = 1 << 16


def network(values: dict[str, Any]) -> Network:
    subnets = {"subnet": IPv4Network, "ipv6_subnet": IPv6Network}
    return Network(**{key: subnets.get(key, lambda it: it)(value) for key, value in values.items()})


def machine(uid: str, name: str, nics: list[dict[str, Any]]) -> Machine:
    kernel = KernelBoot("/kernel", "", "")
    return Machine(uid, name, 1, 1, 64, kernel, nics=tuple(Nic(backend=NicBackend.BRIDGE, **nic) for nic in nics))


async def answer(networks: Networks, method: str, arguments: dict[str, Any]) -> tuple[Any, list[int]]:
    if method == "open":
        running = arguments["running"].items()
        ports = {uid: [Port(**port) for port in it["ports"]] for uid, it in running}
        return await networks.open(ports, {uid: it["name"] for uid, it in running}), []
    if method == "plug":
        it = machine(**arguments)
        ports = [asdict(port) for port in networks.ports(it)]
        return ports, list((await networks.plug(it)).values())
    if method == "plan":
        return networks.plan(machine(**arguments)), []
    if method == "addresses":
        return [asdict(address) for address in await networks.addresses(**arguments)], []
    return await getattr(networks, method)(**arguments), []


async def main(descriptor: int, words: dict[str, Any]) -> None:
    made, directory = [network(values) for values in words["networks"]], Path(words["directory"])
    networks = Networks(made, directory, dnsmasq_uid=words["dnsmasq_uid"])
    with socket.socket(fileno=descriptor) as peer:
        peer.setblocking(False)
        while request := await asyncio.get_running_loop().sock_recv(peer, MESSAGE_MAX_BYTES):
            method, arguments = json.loads(request)
            descriptors: list[int] = []
            try:
                if method == "teardown":
                    result: Any = await teardown(made, directory)
                else:
                    result, descriptors = await answer(networks, method, arguments)
                reply = {"result": result}
            except VmherdError as error:
                reply = {"error": error.reason, "message": error.message}
            socket.send_fds(peer, [json.dumps(reply).encode()], descriptors)
            for tap in descriptors:
                socket.close(tap)
    await networks.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))
