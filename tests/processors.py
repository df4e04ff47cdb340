"""More tiny processors of the real classes, each with its family's own way to cut an image up, and models for them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pico
import templates
import torch
from templates import CHATML, IDEFICS_3, PINPOINTS, SQUARE, chatml, no_video, tokenizer
from transformers import (
    AriaImageProcessorPil,
    AriaProcessor,
    AutoConfig,
    AutoModelForImageTextToText,
    AyaVisionProcessor,
    DeepseekVLHybridImageProcessorPil,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessorPil,
    DeepseekVLProcessor,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    JanusImageProcessorPil,
    JanusProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    Ovis2ImageProcessorPil,
    Ovis2Processor,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PreTrainedModel,
    Qwen3VLProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)
from transformers.processing_utils import ProcessorMixin

from striate.vlm import image_token_id

LARGE = {"height": 128, "width": 128}
OVIS = ("<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>")  # its visual indicators, in its order


def aria() -> ProcessorMixin:
    """490 pixels are the fewest that it takes. Not split, as by default: split, each image is given as many tokens as
    the one with most crops, and the model refuses them."""
    images = AriaImageProcessorPil(max_image_size=490)
    reader = AriaProcessor(images, tokenizer(image_token="<image>"), chat_template=CHATML, size_conversion={490: 4})
    reader.images_kwargs = {"max_image_size": 490}
    return reader


def aya_vision() -> ProcessorMixin:
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    tokens = tokenizer(patch="<|IMG_PATCH|>", start="<|START_OF_IMG|>", end="<|END_OF_IMG|>")
    return AyaVisionProcessor(images, tokens, patch_size=8, img_size=32, downsample_factor=2, chat_template=CHATML)


def deepseek_vl() -> ProcessorMixin:
    tokens = tokenizer(image_token="<image>")
    return DeepseekVLProcessor(DeepseekVLImageProcessorPil(size=SQUARE), tokens, CHATML, num_image_tokens=16)


def deepseek_vl_hybrid() -> ProcessorMixin:
    images = DeepseekVLHybridImageProcessorPil(size=SQUARE, high_res_size=LARGE)
    return DeepseekVLHybridProcessor(images, tokenizer(image_token="<image>"), CHATML, num_image_tokens=16)


def glm4v() -> ProcessorMixin:
    size = {"shortest_edge": 2 * 16**2, "longest_edge": 2 * 64**2}  # of a picture twice, as of two frames
    images = Glm4vImageProcessorPil(size=size, patch_size=8, temporal_patch_size=2, merge_size=2)
    tokens = tokenizer(
        image_token="<|image|>", video_token="<|video|>", start="<|begin_of_image|>", end="<|end_of_image|>",
        video_start="<|begin_of_video|>", video_end="<|end_of_video|>",
    )  # fmt: skip
    template = chatml("<|begin_of_image|><|image|><|end_of_image|>")
    return Glm4vProcessor(images, tokens, no_video(), chat_template=template)


def got_ocr2() -> ProcessorMixin:
    images = GotOcr2ImageProcessorPil(size=LARGE)
    reader = GotOcr2Processor(images, tokenizer(pad="<imgpad>"), chat_template=chatml("<img><imgpad></img>"))
    reader.num_image_tokens = 16
    reader.images_kwargs = {"crop_to_patches": True, "max_patches": 4}
    return reader


def idefics2() -> ProcessorMixin:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=True)
    tokens = tokenizer(image_token="<image>", image_boundary_token="<fake_token_around_image>")
    return Idefics2Processor(images, tokens, image_seq_len=4, chat_template=IDEFICS_3)


def janus() -> ProcessorMixin:
    tokens = tokenizer(image_token="<image>", boi_token="<img>", eoi_token="</img>")
    images = JanusImageProcessorPil(size=SQUARE)
    return JanusProcessor(images, tokens, CHATML, use_default_system_prompt=True, num_image_tokens=16)


def mllama() -> ProcessorMixin:
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4)
    return MllamaProcessor(images, tokenizer(image_token="<image>"), chat_template=CHATML)


def ovis2() -> ProcessorMixin:
    named = {f"indicator_{number}": token for number, token in enumerate(OVIS)}
    images = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    tokens = tokenizer(atom="<IMG_ATOM>", **named)
    return Ovis2Processor(images, tokens, chat_template=CHATML, image_seq_length=16)


def paddleocr_vl() -> ProcessorMixin:
    size = {"shortest_edge": 16**2, "longest_edge": 64**2}
    images = PaddleOCRVLImageProcessorPil(size=size, patch_size=8, merge_size=2)
    return PaddleOCRVLProcessor(images, tokenizer(image_token="<image>"), chat_template=CHATML)


def video_llava() -> ProcessorMixin:
    images = VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    return VideoLlavaProcessor(images, no_video(), tokenizer(), patch_size=8, chat_template=CHATML)


MORE: dict[str, Callable[[], ProcessorMixin]] = {
    "aria": aria,
    "aya_vision": aya_vision,
    "deepseek_vl": deepseek_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "glm4v": glm4v,
    "glm4v_moe": glm4v,
    "got_ocr2": got_ocr2,
    "idefics2": idefics2,
    "janus": janus,
    "mllama": mllama,
    "ovis2": ovis2,
    "paddleocr_vl": paddleocr_vl,
    "qwen3_5": lambda: templates.qwen(Qwen3VLProcessor),
    "qwen3_5_moe": lambda: templates.qwen(Qwen3VLProcessor),
    "qwen3_vl_moe": lambda: templates.qwen(Qwen3VLProcessor),
    "video_llava": video_llava,
    "vipllava": templates.llava,
}

FAMILIES = {**templates.FAMILIES, **MORE}
IMAGE_NEEDED = ("got_ocr2", "paligemma")  # they refuse a question without an image


def processor(family: str) -> ProcessorMixin:
    """The family's processor; stand-ins for its video side are let in."""
    with patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return FAMILIES[family]()


# What the config of a pico model says otherwise, to go with these processors.

_TILINGS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
_WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_FITTING: dict[str, dict[str, Any]] = {
    "aria": {
        "vision_config": {"model_type": "idefics3_vision", "image_size": 490, "patch_size": 70},
        "projector_patch_to_query_dict": {"49": 4},
    },
    "llava": _WHOLE,
    "llava_next": {**_WHOLE, "image_grid_pinpoints": PINPOINTS},
    "llava_onevision": {**_WHOLE, "image_grid_pinpoints": PINPOINTS},
    "mllama": {"vision_config": {"max_num_tiles": 4, "supported_aspect_ratios": _TILINGS}},
    "ovis2": {"vision_config": {"num_visual_indicator_tokens": len(OVIS)}},
}


def fitting(family: str, reader: ProcessorMixin) -> PreTrainedModel:
    """A pico model that takes what the processor gives."""
    ids, image = reader.tokenizer.convert_tokens_to_ids, image_token_id(reader)
    vocabulary = len(reader.tokenizer)
    settings = deepcopy({**pico.FAMILIES, **pico.MORE, **pico.OTHERS}[family])
    for name, value in _FITTING.get(family, {}).items():
        settings[name] = settings[name] | value if isinstance(settings.get(name), dict) else value
    settings["text_config"] |= {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2}
    settings |= {"image_token_id": image, "image_token_index": image}
    if family.startswith("qwen"):
        settings |= {"vision_start_token_id": ids("<|vision_start|>"), "video_token_id": ids("<|video_pad|>")}
    if family == "ovis2":
        settings |= {"vocab_size": vocabulary, "visual_indicator_token_ids": ids(list(OVIS))}
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings)).eval()
