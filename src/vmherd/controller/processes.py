"""ProcessService: programs in a guest, with their whole output."""

from __future__ import annotations

from vmherd import guest_agent
from vmherd.api.v1 import process_pb2, process_pb2_grpc
from vmherd.controller import convert
from vmherd.controller.agent_calls import Context, time_left_s, to_vmherd_error
from vmherd.controller.herd import Herd
from vmherd.guest_agent import AgentError
from vmherd.model.errors import FieldViolation, InvalidArgument

RUN_TIMEOUT_DEFAULT_S = 60.0
RUN_TIMEOUT_MIN_S = 0.001

WORDS_MAX = 1024
INPUT_MAX_BYTES = 16 << 20
NAME_SHOWN = 64
"""How much of a wrong variable's name an error shows."""


class ProcessServicer(process_pb2_grpc.ProcessServiceServicer):
    """See protos/vmherd/api/v1/process.proto."""

    def __init__(self, herd: Herd) -> None:
        self._herd = herd

    async def Run(self, request: process_pb2.RunRequest, context: Context) -> process_pb2.RunResponse:
        violations = list(_check_run(request))
        if violations:
            raise InvalidArgument.of(violations)
        timeout_s = convert.seconds(request, "timeout", default_s=RUN_TIMEOUT_DEFAULT_S, minimum_s=RUN_TIMEOUT_MIN_S)
        agent = self._herd.find(request.name).open_agent()
        try:
            result = await guest_agent.run(
                agent,
                list(request.command),
                input_data=request.input,
                env=dict(request.environment) or None,
                timeout_s=min(timeout_s, time_left_s(context, timeout_s)),
            )
        except AgentError as error:
            raise to_vmherd_error(error, request.name) from error
        stdout, stdout_raw = _text(result.stdout)
        stderr, stderr_raw = _text(result.stderr)
        return process_pb2.RunResponse(
            exit_code=128 + result.signal if result.signal is not None else result.exit_code or 0,
            signal=result.signal,
            stdout=stdout,
            stderr=stderr,
            stdout_raw=stdout_raw,
            stderr_raw=stderr_raw,
            stdout_truncated=result.stdout_truncated,
            stderr_truncated=result.stderr_truncated,
        )


def _check_run(request: process_pb2.RunRequest) -> list[FieldViolation]:
    violations = []
    if not request.command or not request.command[0]:
        violations.append(FieldViolation("command", 'must be a list of words, such as ["uname", "-a"]'))
    if len(request.command) > WORDS_MAX:
        violations.append(FieldViolation("command", f"must have at most {WORDS_MAX} words"))
    if any("\0" in word for word in request.command):
        violations.append(FieldViolation("command", "must not hold a NUL character"))
    for key, value in request.environment.items():
        if not key or "=" in key or "\0" in key + value:
            field = f"environment[{key[:NAME_SHOWN]!r}]"
            violations.append(FieldViolation(field, "a name is not empty, and without '=' and NUL"))
    if len(request.input) > INPUT_MAX_BYTES:
        violations.append(FieldViolation("input", f"must have at most {INPUT_MAX_BYTES} bytes"))
    return violations


def _text(output: bytes) -> tuple[str, bytes | None]:
    """Output as text, and the exact bytes where the text had to replace something."""
    try:
        return output.decode(), None
    except UnicodeDecodeError:
        return output.decode(errors="replace"), output
