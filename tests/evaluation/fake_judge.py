"""A small server on loopback that answers as an OpenAI-compatible one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a reply function returns: a text to wrap as a completion, or (status, headers, raw body) as it is.
Reply = str | tuple[int, dict[str, str], bytes]


class FakeJudge:
    """Its address, and the requests that it got: path, headers and body of each."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.reply, self.lock = reply, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    answer = outer.reply(body)
                if isinstance(answer, str):
                    content = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                    answer = (200, {}, json.dumps(content).encode())
                status, headers, raw = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), {}))
                self.send_error(405)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[FakeJudge]:
    judge = FakeJudge(reply)
    thread = threading.Thread(target=judge.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()
        thread.join()


def parts(body: dict[str, Any]) -> tuple[str, str, str]:
    """Request, answer A and answer B of what the judge was asked."""
    text = body["messages"][-1]["content"]
    request = text.split("[Request]\n")[1].split("\n\n[Answer A begins]")[0]
    first = text.split("[Answer A begins]\n")[1].split("\n[Answer A ends]")[0]
    second = text.split("[Answer B begins]\n")[1].split("\n[Answer B ends]")[0]
    return request, first, second
