"""Make the demo's pretrained parts from nothing: a tower that sees, a language model, a projector between.

`python scripts/demo_models` makes all three, in order; `--only projector` makes one of them, from the others as they
are on disk. It takes about 30 minutes on two CPU cores with bf16 matrix units. It needs the extra `demo`, a C++
compiler (for `torch.compile`) and torch >= 2.9 (for `torch.optim.Muon`).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from backbone import train_backbone
from projector import align_projector
from tower import train_tower

MODELS = Path(__file__).parents[2] / "src" / "striate" / "demo" / "models"
MAKERS = {"tower": train_tower, "backbone": train_backbone, "projector": align_projector}


def main() -> None:
    """Make the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MAKERS), help="make one part")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(2)
    for part, make in MAKERS.items():
        if options.only in (None, part):
            make(options.out, seed=options.seed)


if __name__ == "__main__":
    main()
