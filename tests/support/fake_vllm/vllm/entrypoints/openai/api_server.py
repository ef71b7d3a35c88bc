"""A server of completions that burns a known processor time for a prompt, in a process below it.

It ends at once under arguments or an environment that the real one must not get, refuses a prompt that it has had, and
burns half as much if its arguments have an ``additional_config``. ``--fake-crash-after N`` ends it at request N + 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points

SECONDS_PER_TOKEN = 3e-3


def burn(seconds):
    """Use this much processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def work(pipe, other):
    """Burn what is asked for: the engine, a process apart from the server's, which ends with it."""
    other.close()
    while True:
        try:
            burn(pipe.recv())
        except EOFError:
            return
        pipe.send(None)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("host", "model", "served-model-name", "dtype", "load-format", "additional-config", "hf-overrides"):
        parser.add_argument(f"--{name}")
    for name in ("port", "max-model-len", "max-num-batched-tokens", "max-num-seqs", "seed", "fake-crash-after"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("enable-prefix-caching", "enable-log-requests", "skip-tokenizer-init"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    options = parser.parse_args()
    plugins = {point.value for point in entry_points(group="vllm.general_plugins")}
    pruned = options.additional_config is not None
    if options.enable_prefix_caching is not False:
        sys.exit("ValueError: a prefix cache would answer for the prefill")
    if pruned and (json.loads(options.additional_config), plugins) != (
        {"pop_ext": {"plan": "third"}},
        {"pop_ext.vllm:register"},
    ):
        sys.exit(f"ValueError: expected a plan and pop_ext's plugin, got {options.additional_config}, {plugins}")
    if not pruned and os.environ["VLLM_PLUGINS"]:  # empty: vLLM loads none of those that are installed
        sys.exit("ValueError: expected no plugin in a plain server")
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=work, args=(theirs, ours), daemon=True).start()
    lock, seen = threading.Lock(), set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["prompt"]
            with lock:
                if options.fake_crash_after is not None and len(seen) == options.fake_crash_after:
                    os._exit(3)
                fresh = tuple(prompt) not in seen
                seen.add(tuple(prompt))
                if fresh:
                    ours.send(SECONDS_PER_TOKEN * len(prompt) / (2 if pruned else 1))
                    ours.recv()
            self.send_response(200 if fresh and body["ignore_eos"] and body["stream"] else 500, "a prompt came twice")
            self.end_headers()
            if fresh:
                for _ in range(body["max_tokens"]):
                    self.wfile.write(b"data: " + json.dumps({"choices": [{"text": ""}]}).encode() + b"\n\n")
                    self.wfile.flush()
                    time.sleep(0.01)
                usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}
                self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")

    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
