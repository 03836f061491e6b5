"""Serves what `twinkle-callbacks serve` and `status` ask for, and shows at `/started` how it was started.

`--fake-exit-code N` ends it before it serves, `--fake-unready` keeps it from getting ready, `--fake-child` gives it a
child process, as vLLM has, which outlives it unless somebody ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {
    "/health": {},
    "/weight_info": {"weight_version": "3"},
    "/is_paused": {"is_paused": False},
    "/get_world_size": {"world_size": 2},
    "/v1/models": {"data": [{"id": "tiny"}]},
    "/server_info": {"vllm_config": {"lora_config": None, "weight_transfer_config": {"backend": "twinkle"}}},
}


def value_of(flag: str) -> str:
    # The last one counts, as in argparse.
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(flag)]


def main() -> None:
    print("fake vLLM starts", flush=True)
    if "--fake-exit-code" in sys.argv:
        print("ValueError: no such model", file=sys.stderr, flush=True)
        sys.exit(int(value_of("--fake-exit-code")))
    started = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}
    if "--fake-child" in sys.argv:
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.sigwait([signal.SIGUSR1])"])
        started["child"] = child.pid

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answer = started if path == "/started" else ANSWERS.get(path)
            unready = path == "/health" and "--fake-unready" in sys.argv
            body = json.dumps(answer).encode()
            self.send_response(503 if unready else 404 if answer is None else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    ThreadingHTTPServer((value_of("--host"), int(value_of("--port"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
