"""The agent's commands with what the wire does not give: when they are done, and what vmherd has to keep in mind."""

from __future__ import annotations

from collections.abc import Mapping

from vmherd.controller.supervisor import Supervisor


async def execute(
    supervisor: Supervisor,
    command: str,
    arguments: Mapping[str, object],
    *,
    timeout_s: float,
    thaw_after_s: float | None = None,
) -> object:
    """Carries out one of the agent's commands and gives its JSON value.

    Raises:
        FailedPrecondition: the instance does not run.
        AgentError: what the agent's client raises.
    """
    return await supervisor.open_agent().execute(command, arguments, timeout_s=timeout_s)
