"""What workers ask each other: an answer reaches who asked for it, also where somebody before has left."""

import asyncio
import json
import socket
from typing import Any

from deploy.serving.peers import Peers


def test_an_answer_that_comes_too_late_goes_to_nobody() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        peers = Peers(ours, {})
        await peers.start()
        reader, writer = await asyncio.open_connection(sock=theirs)

        async def asked() -> dict[str, Any]:
            return dict(json.loads(await reader.readline()))

        def tell(answers: list[str], question: dict[str, Any]) -> None:
            writer.write(json.dumps({"answers": answers, "id": question["id"]}).encode() + b"\n")

        assert await asked() == {"ready": True}
        left = asyncio.create_task(peers.ask("look"))
        first = await asked()
        left.cancel()
        waits = asyncio.create_task(peers.ask("metrics"))
        second = await asked()
        tell(["look"], first)
        tell(["metrics"], second)
        assert await asyncio.wait_for(waits, 10) == ["metrics"]
        await peers.stop()
        writer.close()

    asyncio.run(run())
