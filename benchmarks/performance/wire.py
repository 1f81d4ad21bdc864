"""What a round costs on the wire: bytes, requests and seconds, for every node.

    python -m benchmarks.performance.wire --out results/wire.json

Starts a real SuperLink and two SuperNodes on this machine. Each node reaches the
SuperLink through a proxy that counts HTTP requests and bytes and holds back what
passes, in each direction, for the given delay. Training is a single step, so
that the wire is what remains. Every case is measured twice: with all arrays
packed into one, as the project does it, and with each on its own; the first
also with every way to round what travels.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from benchmarks.accuracy.recorded import WIRES
from fedssl.deployment.checks import free_port
from fedssl.deployment.commands import environment
from fedssl.env import ROOT
from fedssl.runs.provenance import provenance

ROUNDS = 2
SETTINGS = ["train.max_steps=1", "train.local_epochs=1", "train.batch_size=8", "monitor.bank=10"]
SETTINGS += [f"num_rounds={ROUNDS}", "monitor.queries=10", "keep_checkpoints=1", "num_cpus=1"]
# Put behind the module in a copy of the project; what it defines counts from then on.
APART = """

def pack_arrays(arrays):
    return arrays


def unpack_arrays(arrays):
    return arrays
"""


class Requests:
    """Counts the requests of one HTTP/1.1 connection, by path, from its bytes."""

    def __init__(self, counts: Counter) -> None:
        self.counts, self.head, self.body_left = counts, b"", 0

    def feed(self, data: bytes) -> None:
        """Follow the stream of requests."""
        while data:
            if self.body_left:
                used = min(self.body_left, len(data))
                self.body_left -= used
                data = data[used:]
                continue
            self.head += data
            head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            self.head = b""
            self.counts[head.split(b" ")[1].decode()] += 1
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            self.body_left = int(length[1]) if length else 0


class Proxy:
    """A TCP proxy on a port of its own that counts and delays."""

    def __init__(self, target_port: int, delay_s: float) -> None:
        self.port, self.target_port, self.delay_s = free_port(), target_port, delay_s
        self.up = self.down = 0
        self.requests: Counter = Counter()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        start = asyncio.start_server(self._connect, "127.0.0.1", self.port)
        self.loop.run_until_complete(start)
        self.loop.run_forever()

    async def _connect(self, reader, writer) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(
            "127.0.0.1", self.target_port
        )
        parser = Requests(self.requests)
        await asyncio.gather(
            self._pump(reader, upstream_writer, parser),
            self._pump(upstream_reader, writer, None),
        )

    async def _pump(self, reader, writer, parser: Requests | None) -> None:
        """Pass on chunks, each `delay_s` after it came, without holding up later ones."""
        queue: asyncio.Queue = asyncio.Queue()

        async def deliver() -> None:
            while (item := await queue.get()) is not None:
                due, data = item
                await asyncio.sleep(max(0, due - self.loop.time()))
                writer.write(data)
                await writer.drain()
            writer.close()

        delivery = asyncio.create_task(deliver())
        try:
            while data := await reader.read(65536):
                if parser:
                    parser.feed(data)
                    self.up += len(data)
                else:
                    self.down += len(data)
                queue.put_nowait((self.loop.time() + self.delay_s, data))
        except ConnectionError:
            pass
        queue.put_nowait(None)
        await asyncio.gather(delivery, return_exceptions=True)


def measure(encoder: str, packed: bool, wire: str, delay_s: float, place: Path) -> dict:
    """Run a federation of two nodes and give the cost of a round for a node."""
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "outputs", "results"))
    if not packed:
        with (place / "fedssl" / "federation" / "messages.py").open("a") as messages:
            messages.write(APART)
    port = free_port()
    env = environment(FLWR_HOME=str(place / "flower"))
    log = (place / "log.txt").open("w")

    def start(*command: str) -> subprocess.Popen:
        return subprocess.Popen(command, cwd=place, env=env, stdout=log, stderr=log)

    proxies = [Proxy(port, delay_s) for _ in range(2)]
    running = [start("flower-superlink", "--insecure", "--port", str(port))]
    try:
        time.sleep(5)
        for number, proxy in enumerate(proxies, start=1):
            link = f"127.0.0.1:{proxy.port}"
            node = ("flower-client-app", f"app:client{number}", "--insecure", "--superlink", link)
            running.append(start(*node))
        link = f"127.0.0.1:{port}"
        server = start(
            *("flower-server-app", "app:server", "--insecure", "--superlink", link),
            *(f"model={encoder}", f"wire={wire}", "output_dir=outputs", *SETTINGS),
        )
        if server.wait(1200):
            raise SystemExit(f"the run failed:\n{Path(log.name).read_text()[-3000:]}")
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()
    rows = [json.loads(line) for line in (place / "outputs/latest/metrics.jsonl").open()]
    count = 2 * ROUNDS
    requests = sum((proxy.requests for proxy in proxies), Counter())
    idle = ("heartbeat", "pull-messages", "/health")
    return {
        "encoder": encoder,
        "packed": packed,
        "wire": wire,
        "delay_ms": delay_s * 1000,
        "requests": sum(n for path, n in requests.items() if not any(i in path for i in idle))
        / count,
        "down_mb": sum(proxy.down for proxy in proxies) / count / 1e6,
        "up_mb": sum(proxy.up for proxy in proxies) / count / 1e6,
        "seconds": min(row["seconds"] for row in rows),
        "requests_by_path": dict(requests),
    }


def main() -> None:
    """Measure all cases, print a table, and write them with their provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--delays-ms", nargs="+", type=float, default=[0, 50])
    parser.add_argument("--packed-only", action="store_true", help="leave single arrays out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cases = [
        (encoder, packed, "float32", delay_ms)
        for encoder in given.encoders
        for delay_ms in given.delays_ms
        for packed in (False, True)
        if packed or not given.packed_only
    ]
    cases += [(given.encoders[0], True, wire, given.delays_ms[0]) for wire in WIRES[1:]]
    rows = []
    print(
        f"{'encoder':10}{'arrays':8}{'wire':10}{'delay':>6}{'requests':>10}{'down':>8}{'up':>10}"
        f"{'round':>9}"
    )
    for encoder, packed, wire, delay_ms in cases:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(encoder, packed, wire, delay_ms / 1000, Path(folder, "project"))
        rows.append(row)
        print(
            f"{encoder:10}{'packed' if packed else 'apart':8}{wire:10}{delay_ms:3.0f} ms"
            f"{row['requests']:10.0f}{row['down_mb']:5.0f} MB{row['up_mb']:7.1f} MB"
            f"{row['seconds']:7.1f} s",
            flush=True,
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": "python -m benchmarks.performance.wire",
            "rows": rows,
            "measured": provenance(),
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
