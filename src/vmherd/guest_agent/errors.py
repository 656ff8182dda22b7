"""What can go wrong with a guest agent, ordered by what the caller can do about it.

::

    AgentError
     ├── AgentUnavailable         nobody answers; look at the VM, or try again later
     │    ├── AgentNotConfigured  there is no socket: start the VM with an agent channel
     │    ├── AgentNotRunning     the guest has not opened its end: wait for the boot, or install the agent
     │    ├── AgentNotConnected   the socket refused us or closed: the next call connects again
     │    └── AgentUnresponsive   the deadline passed: allow more time, or see what hangs
     ├── CommandUnavailable       the agent answers, and does not run this command
     │    ├── CommandNotFound     this agent does not know it: update the guest
     │    ├── CommandDisabled     whoever configured the guest forbids it, or its system cannot do it
     │    └── AgentFrozen         file systems are frozen: thaw them first
     ├── CommandFailed            the agent tried and says why it failed
     ├── CommandTimedOut          a program was started in the guest and ended when its time was up
     ├── CommandUnfinished        a program was started in the guest and its end was not seen
     └── ProtocolError            what came is not a guest agent's reply

No call is ever repeated by this package. Where the guest may have carried out a command whose reply was not seen,
`outcome_unknown` is true and the text says so: only the caller can tell whether to ask again.
"""

from __future__ import annotations


class AgentError(Exception):
    """The base of all errors of this package.

    `command` is the agent's command that was called and `elapsed_s` the time since then. `outcome_unknown` says that
    the command reached the socket, so that the guest may have carried it out; `message` is the text without that.
    """

    def __init__(self, message: str, *, command: str, elapsed_s: float, outcome_unknown: bool = False) -> None:
        super().__init__(f"{message}; outcome unknown" if outcome_unknown else message)
        self.message = message
        self.command = command
        self.elapsed_s = elapsed_s
        self.outcome_unknown = outcome_unknown


class AgentUnavailable(AgentError):
    """Nobody answers on the agent's channel."""


class AgentNotConfigured(AgentUnavailable):
    """There is no socket at the path: no VM with an agent channel runs there."""


class AgentNotRunning(AgentUnavailable):
    """The channel is there, and no agent in the guest has opened its end of it."""


class AgentNotConnected(AgentUnavailable):
    """The socket refused the connection, or the connection was lost."""


class AgentUnresponsive(AgentUnavailable):
    """The deadline passed first."""


class CommandUnavailable(AgentError):
    """The agent does not run this command; of this class itself only if it did not say why."""


class CommandNotFound(CommandUnavailable):
    """The agent in this guest does not know the command."""


class CommandDisabled(CommandUnavailable):
    """The agent knows the command and is not allowed, or not able, to run it in this guest."""


class AgentFrozen(CommandUnavailable):
    """The guest's file systems are frozen: only ping, info, sync, fsfreeze-status and fsfreeze-thaw are answered."""


class CommandFailed(AgentError):
    """The agent tried and failed.

    `error_class` and `desc` are the agent's own words. The text of `desc` differs between versions of the agent.
    """

    def __init__(self, error_class: str, desc: str, *, command: str, elapsed_s: float) -> None:
        super().__init__(f"{command}: {desc}", command=command, elapsed_s=elapsed_s)
        self.error_class = error_class
        self.desc = desc


class CommandTimedOut(AgentError):
    """A program was started in the guest as process `pid`, and was ended since its time was up."""

    def __init__(self, message: str, *, command: str, elapsed_s: float, pid: int) -> None:
        super().__init__(message, command=command, elapsed_s=elapsed_s)
        self.pid = pid


class CommandUnfinished(AgentError):
    """A program was started in the guest and its end was not seen: it may still run there, as process `pid`."""

    def __init__(self, message: str, *, command: str, elapsed_s: float, pid: int) -> None:
        super().__init__(message, command=command, elapsed_s=elapsed_s, outcome_unknown=True)
        self.pid = pid


class ProtocolError(AgentError):
    """What came over the channel is not a reply that a guest agent may give."""
