"""Reading and checking a JSON of LLaVA-665K's shape: 665,000 generated records, seconds and peak memory.

    python bench/records.py --out bench/results/records.json

Six in a hundred records are text only, the others have one image each (empty files, a few thousand a folder) and five
questions: about a gigabyte of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import tempfile
import time
from pathlib import Path

from striate.data import read

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")
WORDS = ["what", "is", "the", "color", "of", "this", "small", "object", "near", "a", "window", "and", "how", "many"]


def write(folder: Path, num_records: int, num_images: int) -> Path:
    """The data and its image files."""
    rng = random.Random(0)
    names = [f"{FOLDERS[i % len(FOLDERS)]}/{i:012d}.jpg" for i in range(num_images)]
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for _ in range(5000)]
    path = folder / "mix665k.json"
    with path.open("w") as file:
        for number in range(num_records):
            image = {} if number % 16 == 0 else {"image": names[number % num_images]}
            turns = [{"from": ("human", "gpt")[turn % 2], "value": rng.choice(texts)} for turn in range(10)]
            if image:
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            file.write(
                ("[" if number == 0 else ", ") + json.dumps({"id": str(number), **image, "conversations": turns})
            )
        file.write("]")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--images", type=int, default=350_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), options.records, options.images)
        size = path.stat().st_size
        began = time.monotonic()
        found = read(path)
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        again = time.monotonic()
        for index in random.Random(1).sample(range(len(found)), min(1000, len(found))):
            assert found.records[index].id == str(index)
        access = (time.monotonic() - again) / 1000
    result = {
        "records": len(found), "megabytes": round(size / 2**20), "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak, 2), "milliseconds_a_record_again": round(access * 1000, 3),
        "python": platform.python_version(),
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
