"""How long it takes to read 665,000 records, and from `striate tune` to its first step on them.

    python bench/records.py --out bench/results/records.json [--keep FOLDER]

Writes a file in the shape of LLaVA-1.5's `llava_v1_5_mix665k.json`: its ten sources with their numbers of records and
folders of images, conversations of several turns, about 1 GB, generated words; and an image for every path in it
(hard links to a few). Reading and tuning (a pico model, one step) each run in a process of their own, `--turns` times;
medians count. `first_step` is the time until the first step is done, the start of Python included. `processor` is the
processor's time in it: on a machine that does other work, what it would take alone is between the two. Targets: reading
in less than 60 s and 2 GB, the first step within 90 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from PIL import Image
from train import Shape, build


class Source(NamedTuple):
    """Records of one kind: how many, the names of their images (`%d`; empty: text only) and how many there are, mean
    numbers of exchanges in a conversation and of words in a question and an answer."""

    records: int
    image: str
    images: int
    exchanges: int
    question: int
    answer: int


# Numbers of records: Liu et al. 2023, "Improved baselines with visual instruction tuning", table 7. Words are chosen so
# that the file is as large as the published one, 1.0 GB.
COCO, SHARED = "coco/train2017/%012d.jpg", 118_287
SOURCES = (
    Source(157_712, COCO, SHARED, 2, 11, 70),  # LLaVA-Instruct
    Source(40_688, "", 0, 6, 30, 170),  # ShareGPT
    Source(82_783, COCO, SHARED, 5, 6, 1),  # VQAv2
    Source(72_140, "gqa/images/%d.jpg", 72_140, 8, 8, 1),
    Source(8_998, COCO, SHARED, 1, 8, 2),  # OKVQA
    Source(80_000, "ocr_vqa/images/%010d.jpg", 80_000, 5, 6, 3),
    Source(66_160, COCO, SHARED, 1, 30, 1),  # A-OKVQA
    Source(21_953, "textvqa/train_images/%016x.jpg", 21_953, 1, 40, 10),  # TextCaps
    Source(48_447, COCO, SHARED, 8, 10, 7),  # RefCOCO
    Source(86_417, "vg/VG_100K/%d.jpg", 86_417, 10, 10, 7),  # Visual Genome
)
WORDS = [f"w{index}" for index in range(2000)]
LINKS = 30_000  # to one image; file systems allow 32,000 and more
PICO = Shape(
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": False},
    tower={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "image_size": 32, "patch_size": 8},
    question=8, answer=8, batch=16,
)  # fmt: skip
READING = """
import resource, sys, time
from striate.data import read
began, busy = time.perf_counter(), time.process_time()
found = read(sys.argv[1], on_bad="skip")
seconds, busy = time.perf_counter() - began, time.process_time() - busy
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(len(found), len(found.skipped), seconds, busy, peak)
"""


def conversation(draw: random.Random, source: Source) -> list[dict[str, str]]:
    """Questions and answers, the mark of the image in the first question."""

    def words(mean: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(max(1, mean // 2), mean + mean // 2)))

    turns = []
    for number in range(draw.randint(max(1, source.exchanges // 2), source.exchanges + source.exchanges // 2)):
        mark = "<image>\n" if source.image and not number else ""
        turns += [
            {"from": "human", "value": f"{mark}{words(source.question)}?"},
            {"from": "gpt", "value": words(source.answer).capitalize()},
        ]
    return turns


def rows(share: float) -> Iterator[dict[str, Any]]:
    """That share of all records, in random order."""
    draw = random.Random(0)
    order = [source for source in SOURCES for _ in range(round(source.records * share))]
    draw.shuffle(order)
    for number, source in enumerate(order):
        row: dict[str, Any] = {"id": f"{number:012d}"}
        if source.image:
            row["image"] = source.image % draw.randrange(source.images)
        yield row | {"conversations": conversation(draw, source)}


def write(folder: Path, share: float) -> tuple[Path, dict[str, int]]:
    """The file, indented as the published one is, and its images; the numbers of both."""
    file, named, number = folder / "train.json", set[str](), 0
    with file.open("w") as out:
        for number, row in enumerate(rows(share), 1):
            out.write("[\n  " if number == 1 else ",\n  ")
            out.write(json.dumps(row, indent=2).replace("\n", "\n  "))
            named.add(row.get("image", ""))
        out.write("\n]\n")
    named.discard("")
    for parent in {Path(name).parent for name in named}:
        (folder / parent).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(sorted(named)):
        image = folder / f"image{index // LINKS}.jpg"
        if index % LINKS == 0:
            Image.effect_noise((320, 240), 60).convert("RGB").save(image)
        os.link(image, folder / name)
    return file, {"records": number, "bytes": file.stat().st_size, "images": len(named)}


def reading(file: Path) -> dict[str, float]:
    """Seconds to read the records, and the peak memory of the process, interpreter and libraries included, in GB."""
    out = subprocess.run([sys.executable, "-c", READING, file], check=True, capture_output=True, text=True).stdout
    records, skipped, seconds, busy, peak = map(float, out.split())
    if skipped or not records:
        raise SystemExit(f"{skipped:.0f} records were left out: the generator and the reader do not agree")
    return {"seconds": seconds, "processor": busy, "peak_gb": peak}


def tuning(file: Path, model: Path, out: Path) -> dict[str, float]:
    """Seconds from the start of the command until its first step is done, and the peak memory until then, in GB."""
    command = [sys.executable, "-m", "striate", "tune", model, "--data", file, "--out", out, "--steps", "1"]
    settings = ["--batch", "4", "--device", "cpu", "--max-length", "4096"]  # a short step: what comes before it counts
    began = time.perf_counter()
    found: dict[str, float] = {}
    with subprocess.Popen([*map(str, command), *settings], stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if not found and (out / "log.jsonl").exists():
                busy = watched.cpu_times()
                found = {"first_step": time.perf_counter() - began, "processor": busy.user + busy.system}
            time.sleep(0.05)
    if process.returncode or not found:
        raise SystemExit(f"striate tune failed ({process.returncode})")
    return found | {"peak_gb": json.loads((out / "run.json").read_text())["training"]["peak_memory_gb"]}


def main() -> None:
    """Write, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="write the data here, or use what is there")
    parser.add_argument("--share", type=float, default=1.0, help="of the records")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        about = folder / "about.json"
        if not about.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "data").mkdir()
            amounts = write(folder / "data", args.share)[1]
            vlm = build(PICO, torch.device("cpu"), torch.float32)
            vlm.model.save_pretrained(folder / "model")
            vlm.processor.save_pretrained(folder / "model")
            about.write_text(json.dumps(amounts))
        file = folder / "data" / "train.json"
        turns = []
        for turn in range(args.turns):
            read = reading(file)
            tuned = tuning(file, folder / "model", Path(temporary) / f"run{turn}")
            turns.append({"read": read, "tune": tuned})
            print(json.dumps(turns[-1]))
        found = {
            verb: {name: median(turn[verb][name] for turn in turns) for name in turns[0][verb]} for verb in turns[0]
        }
        result = {
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "versions": {"python": platform.python_version(), "transformers": transformers.__version__},
            "data": json.loads(about.read_text()),
            "medians": found,
            "turns": turns,
        }
        print(json.dumps(result["data"] | found, indent=2))
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
