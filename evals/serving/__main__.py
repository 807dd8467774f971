"""Tokens per second of `linearize serve` at several numbers of clients:
`python -m evals.serving MODEL --clients 1,8`.

Each client sends one request after another, without a pause; all are greedy and stream nothing. The first request of
each client is not counted. A row has the new tokens of all clients per second, and per second of the server's processor
time, which does not depend on what else the machine does; and the server's resident memory before and after it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SUBJECTS = ("a lighthouse", "a fox", "the sea", "a train", "an old clock", "the moon", "a garden", "a bridge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,8", help="numbers of clients")
    parser.add_argument("--requests", type=int, default=3, help="counted requests of each client")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request, at most")
    parser.add_argument("--at-once", type=int, help="as of linearize serve")
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    command = [sys.executable, "-m", "linearize", "serve", given.model, "--port", "0", "--json", "--dtype", given.dtype]
    command += [] if given.at_once is None else ["--at-once", str(given.at_once)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert server.stdout is not None  # noqa: S101 - it is a pipe
        facts = json.loads(server.stdout.readline() or sys.exit("the server has ended"))
        print(json.dumps(facts))
        for clients in map(int, given.clients.split(",")):
            _measure(facts, server.pid, clients, given.requests, given.tokens)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def _measure(facts: dict[str, Any], pid: int, clients: int, requests: int, tokens: int) -> None:
    with ThreadPoolExecutor(clients) as pool:

        def client(number: int, rounds: int) -> int:
            return sum(_ask(facts, SUBJECTS[number % len(SUBJECTS)], tokens) for _ in range(rounds))

        list(pool.map(client, range(clients), [1] * clients))
        before, began, busy = _resident(pid), time.perf_counter(), _cpu_seconds(pid)
        written = sum(pool.map(client, range(clients), [requests] * clients))
        seconds, busy = time.perf_counter() - began, _cpu_seconds(pid) - busy
    row = {"clients": clients, "tokens": written, "seconds": round(seconds, 2)}
    row |= {"tokens_per_second": round(written / seconds, 1), "per_cpu_second": round(written / busy, 1)}
    print(json.dumps({**row, "resident_mb": [before, _resident(pid)]}), flush=True)


def _ask(facts: dict[str, Any], subject: str, tokens: int) -> int:
    body = {"prompt": f"A long story about {subject}, in many sentences.\n\n", "max_tokens": tokens, "temperature": 0}
    url = f"{facts['url']}/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
        return int(json.load(answer)["usage"]["completion_tokens"])


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


if __name__ == "__main__":
    main()
