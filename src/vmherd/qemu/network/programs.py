"""The programs that networks need."""

from __future__ import annotations

import asyncio
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE

from vmherd.model.errors import FailedPrecondition

NFT_TIMEOUT_S = 20.0


def find_program(name: str, *, package: str) -> str:
    """The path of a program that only root may have in its PATH.

    Raises:
        FailedPrecondition: it is not installed.
    """
    if path := shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"):
        return path
    raise FailedPrecondition(
        f"{name} is not installed, and networks need it: install the package {package}",
        reason="PROGRAM_MISSING",
        metadata={"program": name, "package": package},
    )


async def nft(text: str) -> None:
    """Carries out one transaction of nft: all of it or nothing.

    Raises:
        FailedPrecondition: nft refuses it, or is not installed.
    """
    program = find_program("nft", package="nftables")
    process = await asyncio.create_subprocess_exec(program, "--file", "-", stdin=PIPE, stdout=DEVNULL, stderr=PIPE)
    try:
        async with asyncio.timeout(NFT_TIMEOUT_S):
            _, stderr = await process.communicate(text.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = stderr.decode(errors="replace").strip()
        raise FailedPrecondition(f"nft refuses the rules of a network: {said}", reason="NFT_FAILED")
