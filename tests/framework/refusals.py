"""What an error must look like: over HTTP, over gRPC and on the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import grpc
import httpx
from google.protobuf import json_format

from tests.framework.herd import HerdUnderTest
from vmherd.model.errors import VmherdError
from vmherd.rpc.status import number_of, to_status

COMMAND_TIMEOUT_S = 60.0

OF_GRPC_S_OWN = re.compile(r"[IWE]\d{4} [\d:.]+ +\d+ \w+\.cc:\d+\] |WARNING: All log messages before absl::")
"""A line that gRPC's C++ part writes past every log."""


def told(status: dict[str, Any], code: str, reason: str, *words: str) -> dict[str, Any]:
    """Checks a `google.rpc.Status` in JSON: its code, its one ErrorInfo, and what its message has to tell."""
    infos = [detail for detail in status["details"] if detail["@type"].endswith("/google.rpc.ErrorInfo")]
    assert [(info["domain"], info["reason"]) for info in infos] == [("vmherd", reason)], status
    assert status["code"] == number_of(grpc.StatusCode[code]), status
    for word in words:
        assert word in status["message"], status["message"]
    return status


def refused(response: httpx.Response, http_code: int, code: str, reason: str, *words: str) -> dict[str, Any]:
    """Checks an answer over HTTP that is an error, and gives its status."""
    assert response.status_code == http_code, response.text
    return told(response.json(), code, reason, *words)


def raised(error: VmherdError) -> dict[str, Any]:
    """An error that came over gRPC as the status that it was."""
    return json_format.MessageToDict(to_status(error))


def violations(status: dict[str, Any]) -> dict[str, str]:
    """What is wrong, by field."""
    details = (detail for detail in status["details"] if detail["@type"].endswith("/google.rpc.BadRequest"))
    return {it["field"]: it["description"] for detail in details for it in detail["fieldViolations"]}


def vmherd(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vmherd", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


def fails(ended: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    """Checks a command that failed: its exit code, and one line that tells why beside what a process has logged."""
    assert (ended.returncode, ended.stdout) == (exit_code, ""), ended
    [line] = [line for line in ended.stderr.splitlines() if not OF_GRPC_S_OWN.match(line) and not line.startswith("{")]
    assert line.startswith("vmherd: ")
    for word in words:
        assert word in line


def command(herd: HerdUnderTest, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on a herd."""
    return vmherd("--rundir", str(herd.directory), *words)
