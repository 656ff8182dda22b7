"""Channels to vmherd's servers."""

from __future__ import annotations

from pathlib import Path

import grpc

ANSWER_MAX_BYTES = 160 * 1024 * 1024
"""Room for the largest answer there is: two outputs of 16 MiB, each as bytes and as text of three bytes for each."""

OPTIONS = (
    # gRPC waits up to two minutes between attempts; with this the first call after a restart of the peer succeeds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long an attempt may take, for a peer that is busy.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", ANSWER_MAX_BYTES),
    # The peer is on this host: no proxy of the environment lies in between.
    ("grpc.enable_http_proxy", 0),
)

READY = ("vmherd-ready", "1")
"""Initial metadata with which a server that takes a stream says that it can be sent. A refusal comes without."""


def open_channel(socket: Path) -> grpc.aio.Channel:
    """An asyncio channel to a server on a unix socket, which need not be there yet."""
    return grpc.aio.insecure_channel(f"unix:{socket}", options=OPTIONS)
