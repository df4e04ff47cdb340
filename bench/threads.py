"""How fast two threads are, waiting for each other busily or passively, alone and beside a program that takes one core.

    python bench/threads.py

Prints medians (range) of a forward and backward pass of six decoder layers at SmolLM2-135M's width.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

PASSES, TURNS = 3, 3


def measure() -> None:
    """Print the seconds of each pass, by the wait policy of the environment."""
    import torch  # reads the policy when it is imported
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, vocab_size=8192, **sizes))
    tokens = torch.randint(0, 8192, (4, 160))
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        print(time.perf_counter() - start)


@contextlib.contextmanager
def neighbor(busy: bool) -> Iterator[None]:
    """A program that computes all the time."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if program:
            program.kill()


def main() -> None:
    """Take turns, so that what else the machine does meets both alike."""
    found: dict[tuple[bool, str], list[float]] = {}
    for _ in range(TURNS):
        for busy in (False, True):
            for policy in ("ACTIVE", "PASSIVE"):
                environment = os.environ | {"OMP_WAIT_POLICY": policy}
                with neighbor(busy):
                    text = subprocess.check_output([sys.executable, __file__, "--measure"], env=environment, text=True)
                found.setdefault((busy, policy), []).extend(map(float, text.split()[1:]))  # the first warms up
    for (busy, policy), seconds in found.items():
        where = "beside a busy program" if busy else "alone"
        print(f"{where}, {policy}: {median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
