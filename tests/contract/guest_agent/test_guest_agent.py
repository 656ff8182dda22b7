"""What the client makes of an agent, the same for the real one and the fake one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator

import pytest

from tests.contract.guest_agent.conftest import TIMEOUT_S, Peer, StartPeer
from vmherd.guest_agent import (
    AgentFrozen,
    AgentUnavailable,
    AgentUnresponsive,
    CommandDisabled,
    CommandFailed,
    CommandNotFound,
    CommandTimedOut,
    GuestAgent,
    run,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def agent(peer: Peer) -> AsyncIterator[GuestAgent]:
    async with GuestAgent(peer.path) as agent:
        yield agent


async def test_answers_have_the_agents_own_shape(agent: GuestAgent) -> None:
    assert await agent.execute("guest-ping", timeout_s=TIMEOUT_S) == {}
    host_name = await agent.execute("guest-get-host-name", timeout_s=TIMEOUT_S)
    assert host_name == {"host-name": socket.gethostname()}
    os_info = await agent.execute("guest-get-osinfo", timeout_s=TIMEOUT_S)
    assert isinstance(os_info, dict)
    assert isinstance(os_info["id"], str)
    interfaces = await agent.execute("guest-network-get-interfaces", timeout_s=TIMEOUT_S)
    assert isinstance(interfaces, list)
    assert "lo" in [interface["name"] for interface in interfaces]


async def test_info_names_version_and_commands(start_peer: StartPeer) -> None:
    peer = await start_peer(blocked={"guest-get-timezone"})
    async with GuestAgent(peer.path) as agent:
        info = await agent.info(timeout_s=TIMEOUT_S)
    assert info.version.split(".")[0].isdigit()
    assert info.commands["guest-ping"].enabled
    assert not info.commands["guest-get-timezone"].enabled
    assert info.commands["guest-ping"].success_response
    assert not info.commands["guest-shutdown"].success_response


@pytest.mark.parametrize("number", [0, -(1 << 63), (1 << 63) - 1, (1 << 53) + 1])
@pytest.mark.parametrize("command", ["guest-sync", "guest-sync-delimited"])
async def test_integers_keep_all_their_digits(agent: GuestAgent, command: str, number: int) -> None:
    assert await agent.execute(command, {"id": number}, timeout_s=TIMEOUT_S) == number


async def test_time_is_an_integer_of_nanoseconds(agent: GuestAgent) -> None:
    now = await agent.execute("guest-get-time", timeout_s=TIMEOUT_S)
    assert isinstance(now, int)
    assert now > 1_700_000_000_000_000_000


async def test_fifty_callers_get_each_their_own_answer(agent: GuestAgent) -> None:
    numbers = range(50)
    calls = [agent.execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S) for number in numbers]
    assert await asyncio.gather(*calls) == list(numbers)


@pytest.mark.parametrize("turns", range(6))
async def test_calls_cancelled_in_the_queue_disturb_no_other(agent: GuestAgent, turns: int) -> None:
    tasks = [
        asyncio.create_task(agent.execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S)) for number in range(20)
    ]
    for _ in range(turns):  # so that the first call is met in another place each time
        await asyncio.sleep(0)
    cancelled = range(10, 20, 2)
    for number in cancelled:
        tasks[number].cancel()
    for number, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
        assert isinstance(result, asyncio.CancelledError) if number in cancelled else result == number


async def test_unknown_command(agent: GuestAgent) -> None:
    with pytest.raises(CommandNotFound) as caught:
        await agent.execute("guest-make-coffee", timeout_s=TIMEOUT_S)
    assert caught.value.command == "guest-make-coffee"
    assert not caught.value.outcome_unknown


async def test_disabled_command(start_peer: StartPeer) -> None:
    peer = await start_peer(blocked={"guest-get-timezone"})
    async with GuestAgent(peer.path) as agent:
        with pytest.raises(CommandDisabled, match="guest-get-timezone"):
            await agent.execute("guest-get-timezone", timeout_s=TIMEOUT_S)


async def test_disabled_silent_command(start_peer: StartPeer) -> None:
    peer = await start_peer(blocked={"guest-shutdown"})
    async with GuestAgent(peer.path) as agent:
        with pytest.raises(CommandDisabled, match="guest-shutdown"):
            await agent.send("guest-shutdown", timeout_s=TIMEOUT_S)


async def test_frozen_agent(start_peer: StartPeer) -> None:
    peer = await start_peer(frozen=True)
    async with GuestAgent(peer.path) as agent:
        with pytest.raises(AgentFrozen, match="guest-get-host-name"):
            await agent.execute("guest-get-host-name", timeout_s=TIMEOUT_S)
        await agent.ping(timeout_s=TIMEOUT_S)
        assert await agent.execute("guest-fsfreeze-status", timeout_s=TIMEOUT_S) == "frozen"


async def test_failed_command_brings_the_agents_words(agent: GuestAgent) -> None:
    with pytest.raises(CommandFailed) as caught:
        await agent.execute("guest-exec-status", {"pid": 999_999_999}, timeout_s=TIMEOUT_S)
    assert caught.value.error_class == "GenericError"
    assert "pid" in caught.value.desc
    assert not caught.value.outcome_unknown
    await agent.ping(timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    "left_behind",
    [
        b'{"execute": "guest-pi',
        b'{"execute": "guest-ping", "arguments": {',
        b'{"execute": "guest-ping", "id": 7',
        b"[[[[[[[[",
        b"hello world\n",
        b"}}}}\n",
        b"\xff\xff\xff",
        b'{"execute": "guest-ping", "id": 7}\n',
    ],
)
async def test_what_an_earlier_client_left_behind_is_void(peer: Peer, left_behind: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as earlier:
        earlier.settimeout(TIMEOUT_S)
        earlier.connect(str(peer.path))
        earlier.sendall(left_behind)
        # A bare qemu-ga ends if a client leaves with replies unread, so this one reads until the agent lets it go.
        earlier.shutdown(socket.SHUT_WR)
        await asyncio.to_thread(earlier.makefile("rb").read)
    async with GuestAgent(peer.path) as agent:
        assert await agent.execute("guest-sync", {"id": 1}, timeout_s=TIMEOUT_S) == 1


async def test_the_agent_hears_one_client_at_a_time(peer: Peer) -> None:
    async with GuestAgent(peer.path) as first, GuestAgent(peer.path) as second:
        await first.ping(timeout_s=TIMEOUT_S)
        with pytest.raises(AgentUnresponsive, match="another client") as caught:
            await second.ping(timeout_s=1)
        assert not caught.value.outcome_unknown
        await first.close()
        await second.ping(timeout_s=TIMEOUT_S)


async def test_connects_again_after_the_agent_came_back(peer: Peer, agent: GuestAgent) -> None:
    await agent.ping(timeout_s=TIMEOUT_S)
    await peer.stop()
    with pytest.raises(AgentUnavailable):
        await agent.ping(timeout_s=TIMEOUT_S)
    await peer.start()
    await agent.ping(timeout_s=TIMEOUT_S)
    await peer.restart()
    await agent.ping(timeout_s=TIMEOUT_S)


async def test_run_gives_output_and_exit_code(agent: GuestAgent) -> None:
    result = await run(agent, ["/bin/echo", "größer 😀", "$HOME"], timeout_s=TIMEOUT_S)
    assert result.stdout.decode() == "größer 😀 $HOME\n"
    assert (result.exit_code, result.signal, result.stderr) == (0, None, b"")

    result = await run(agent, ["sh", "-c", "echo no >&2; exit 3"], timeout_s=TIMEOUT_S)
    assert (result.exit_code, result.signal, result.stdout, result.stderr) == (3, None, b"", b"no\n")


async def test_run_tells_a_signal_from_an_exit_code(agent: GuestAgent) -> None:
    result = await run(agent, ["sh", "-c", "kill -9 $$"], timeout_s=TIMEOUT_S)
    assert (result.exit_code, result.signal) == (None, signal.SIGKILL)


async def test_run_passes_input_and_environment(agent: GuestAgent) -> None:
    every_byte = bytes(range(256))
    result = await run(agent, ["/bin/cat"], input_data=every_byte, timeout_s=TIMEOUT_S)
    assert result.stdout == every_byte

    result = await run(agent, ["/usr/bin/env"], env={"GREETING": "a=b c"}, timeout_s=TIMEOUT_S)
    assert result.stdout == b"GREETING=a=b c\n"


async def test_run_says_where_output_was_cut(agent: GuestAgent) -> None:
    script = "head -c 17000000 /dev/zero; echo short >&2"
    result = await run(agent, ["sh", "-c", script], timeout_s=TIMEOUT_S)
    assert (len(result.stdout), result.stdout_truncated) == (16 << 20, True)
    assert (result.stderr, result.stderr_truncated) == (b"short\n", False)


async def test_run_of_a_program_that_does_not_exist(agent: GuestAgent) -> None:
    with pytest.raises(CommandFailed, match="/no/such/program"):
        await run(agent, ["/no/such/program"], timeout_s=TIMEOUT_S)


async def test_run_that_takes_too_long_is_ended(agent: GuestAgent) -> None:
    with pytest.raises(CommandTimedOut, match=r"sleep did not end within 1 s and was ended") as caught:
        await run(agent, ["sleep", "60"], timeout_s=1)
    assert caught.value.elapsed_s >= 1
    with pytest.raises(ProcessLookupError):
        os.kill(caught.value.pid, signal.SIGKILL)  # the guest is this host
    await agent.ping(timeout_s=TIMEOUT_S)


async def test_a_long_program_does_not_keep_the_agent_from_others(agent: GuestAgent) -> None:
    program = asyncio.create_task(run(agent, ["/bin/sh", "-c", "read line"], timeout_s=TIMEOUT_S, input_data=b""))
    for number in range(20):
        assert await agent.execute("guest-sync", {"id": number}, timeout_s=TIMEOUT_S) == number
    assert (await program).exit_code == 1
