"""How fast two threads are, waiting for each other busily or passively, alone and beside a program that takes one core.

    python bench/threads.py

Prints medians (range) of a forward and backward pass of six decoder layers at SmolLM2-135M's width, and in which share
of that time the main thread had a core, by which training notices that the machine is shared.
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
    """Print the seconds of each pass and of its main thread, by the wait policy of the environment."""
    import torch  # reads the policy when it is imported
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, vocab_size=8192, **sizes))
    tokens = torch.randint(0, 8192, (4, 160))
    for _ in range(PASSES + 1):
        start, ran = time.perf_counter(), time.thread_time()
        model(input_ids=tokens, labels=tokens).loss.backward()
        print(time.perf_counter() - start, time.thread_time() - ran)


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
    found: dict[tuple[bool, str], list[tuple[float, float]]] = {}
    for _ in range(TURNS):
        for busy in (False, True):
            for policy in ("ACTIVE", "PASSIVE"):
                environment = os.environ | {"OMP_WAIT_POLICY": policy}
                with neighbor(busy):
                    text = subprocess.check_output([sys.executable, __file__, "--measure"], env=environment, text=True)
                passes = [(float(clock), float(ran)) for clock, ran in map(str.split, text.splitlines()[1:])]
                found.setdefault((busy, policy), []).extend(passes)  # the first warmed up
    for (busy, policy), passes in found.items():
        seconds, share = [clock for clock, _ in passes], median(ran / clock for clock, ran in passes)
        where = "beside a busy program" if busy else "alone"
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        print(f"{where}, {policy}: {median(seconds):.2f} s {spread}, with a core for {share:.0%} of them")


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
