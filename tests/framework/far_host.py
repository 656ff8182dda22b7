"""A host at the other end of a cable, which knows no way to anything behind us."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.framework.netns import Namespace, join, namespaces

OUR_ADDRESS = "198.51.100.1"
FAR_ADDRESS = "198.51.100.2"
CONNECT_TIMEOUT_S = 2.0


class _TellsWhoAsks(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(f"{self.client_address[0]}\n".encode())


@contextmanager
def far_host(ours: Namespace) -> Iterator[Namespace]:
    """The far host's namespace. On port 80 of `FAR_ADDRESS` it tells everybody who connects which address they have."""
    with namespaces(1) as [far]:
        join(ours, "cable", f"{OUR_ADDRESS}/24", far, "cable", f"{FAR_ADDRESS}/24")
        with far.call(socketserver.ThreadingTCPServer, (FAR_ADDRESS, 80), _TellsWhoAsks) as server:
            serving = threading.Thread(target=server.serve_forever)
            serving.start()
            try:
                yield far
            finally:
                server.shutdown()
                serving.join()


def can_connect(namespace: Namespace, address: str, port: int) -> bool:
    """Whether somebody takes a TCP connection from there."""
    try:
        namespace.call(socket.create_connection, (address, port), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
