"""Records to ask, and pico models of every family whose answers differ."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import processors
import torch
from pico import SPECIAL, filled, pico_llava, pico_tokenizer
from PIL import Image

import striate
from striate.data import Record
from striate.vlm import Vlm


def loud(vlm: Vlm) -> Vlm:
    """Fresh weights are so small that every answer would be the same."""
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.mul_(4)
    return vlm


def record(question: str, *answers: str, image: int | None = None, **fields: Any) -> Record:
    images = () if image is None else (Image.new("RGB", (32, 32), (image, 90, 255 - image)),)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    return Record("", ({"role": "user", "content": content},), images, answers=answers, **fields)


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def answered(question: Record, text: str) -> Record:
    turn = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return replace(question, messages=(*question.messages, turn))


def talkative_llava(folder: Path, **text: Any) -> Path:
    """A LLaVA in bfloat16 whose answers are words, other ones for other images."""
    words = len(pico_tokenizer())
    whole = filled(striate.load(pico_llava(folder, vocab_size=words, **text), device="cpu").model)
    for parameter in whole.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    whole.lm_head.weight.data[: len(SPECIAL)] = 0  # words are more likely than ends
    whole.to(torch.bfloat16).save_pretrained(folder)
    return folder


def in_family(name: str) -> Vlm:
    """A pico model of the family with the family's pico processor."""
    processor = processors.processor(name)
    vlm = Vlm.of(processors.fitting(name, processor))
    vlm.__dict__["processor"] = processor  # in place of the one in a folder
    return vlm
