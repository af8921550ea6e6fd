"""Two hundred jobs in a row: what the backend process keeps of them.

    python tests/benchmarks/server.py [--jobs 200] [--json FILE]

Starts `storydiffusion serve` as Krita does and makes small stories with the embedded model, previews and
all; prints the resident memory after every tenth of the jobs, and by how much the last differs from the
first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from serving import TOKEN, Client, story  # noqa: E402
from storydiffusion.pictures import write_atomically  # noqa: E402


@contextmanager
def backend() -> Iterator[tuple[Client, psutil.Process]]:
    """A process of its own, reached by the port it tells."""
    command = [str(Path(sys.executable).parent / "storydiffusion"), "serve"]
    environment = {**os.environ, "STORYDIFFUSION_TOKEN": TOKEN}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            yield Client(port, timeout=120), psutil.Process(process.pid)
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    megabytes: list[float] = []
    with backend() as (client, process):
        for number in range(args.jobs):
            wanted = {"kind": "generate", "story": story(2, width=128, height=128, seed=number), "previews": True}
            job = client.submit(wanted, key=f"job{number}").json["id"]
            last = client.until_over(job)[-1]
            assert last.event == "finished", last.data
            assert len(client.result(job)[1]) == 2
            client.ask("DELETE", f"/jobs/{job}")
            if (number + 1) % max(args.jobs // 10, 1) == 0:
                megabytes.append(process.memory_info().rss / 1e6)
                print(f"{number + 1:5} jobs  {megabytes[-1]:7.1f} MB", flush=True)
    change = megabytes[-1] / megabytes[0] - 1
    print(f"change    {100 * change:+.1f} %")
    if args.json:
        write_atomically(args.json, json.dumps({"megabytes": megabytes, "change": change}, indent=1).encode())


if __name__ == "__main__":
    main()
