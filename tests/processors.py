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
    CohereCompassImageProcessorPil,
    CohereCompassProcessor,
    Cosmos3EdgeImageProcessorPil,
    Cosmos3EdgeProcessor,
    DeepseekVLHybridImageProcessorPil,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessorPil,
    DeepseekVLProcessor,
    Ernie4_5_VLMoeImageProcessorPil,
    Ernie4_5_VLMoeProcessor,
    Exaone4_5_Processor,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Glm46VImageProcessorPil,
    Glm46VProcessor,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    GraniteDoclingImageProcessorPil,
    GraniteDoclingProcessor,
    HunYuanVLImageProcessorPil,
    HunYuanVLProcessor,
    HyperCLOVAXVisionV2Processor,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    JanusImageProcessorPil,
    JanusProcessor,
    Lfm3VlProcessor,
    LightOnOcrProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextVideoProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    Ovis2ImageProcessorPil,
    Ovis2Processor,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PixtralImageProcessorPil,
    PreTrainedModel,
    QianfanOCRProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
    VideoLlama3ImageProcessorPil,
    VideoLlama3Processor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ProcessorMixin

from striate.vlm.processors import image_token_id

PATCHES = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
PIXELS = {"shortest_edge": 16**2, "longest_edge": 64**2}
LARGE = {"height": 128, "width": 128}
PATCH = {"height": 8, "width": 8}
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
OVIS = ("<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>")  # its visual indicators, in its order


def pinpoints() -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)


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


def cohere_compass() -> ProcessorMixin:
    images = CohereCompassImageProcessorPil(size=PIXELS, **PATCHES)
    tokens = tokenizer(pad="<|IMAGE_PAD|>", video="<|VIDEO_PAD|>", start="<|VISION_START|>", end="<|VISION_END|>")
    template = chatml("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>")
    return CohereCompassProcessor(images, tokens, no_video(), chat_template=template)


def cosmos3_edge() -> ProcessorMixin:
    images = Cosmos3EdgeImageProcessorPil(size=PIXELS, patch_size=8)
    return Cosmos3EdgeProcessor(images, tokenizer(), no_video(), chat_template=chatml(QWEN))


def deepseek_vl() -> ProcessorMixin:
    tokens = tokenizer(image_token="<image>")
    return DeepseekVLProcessor(DeepseekVLImageProcessorPil(size=SQUARE), tokens, CHATML, num_image_tokens=16)


def deepseek_vl_hybrid() -> ProcessorMixin:
    images = DeepseekVLHybridImageProcessorPil(size=SQUARE, high_res_size=LARGE)
    return DeepseekVLHybridProcessor(images, tokenizer(image_token="<image>"), CHATML, num_image_tokens=16)


def ernie4_5_vl_moe() -> ProcessorMixin:
    tokens = tokenizer(
        image_token="<image>", image_start_token="<img>", image_end_token="</img>",
        video_token="<video>", video_start_token="<vid>", video_end_token="</vid>",
    )  # fmt: skip
    images = Ernie4_5_VLMoeImageProcessorPil(size=PIXELS, patch_size=8, merge_size=2)
    return Ernie4_5_VLMoeProcessor(images, tokens, no_video(), chat_template=chatml("<img><image></img>"))


def glm(kind: type[ProcessorMixin], images: type[PilBackend]) -> ProcessorMixin:
    size = {"shortest_edge": 2 * 16**2, "longest_edge": 2 * 64**2}  # of an image twice, as of two frames
    tokens = tokenizer(
        image_token="<|image|>", video_token="<|video|>", start="<|begin_of_image|>", end="<|end_of_image|>",
        video_start="<|begin_of_video|>", video_end="<|end_of_video|>",
    )  # fmt: skip
    template = chatml("<|begin_of_image|><|image|><|end_of_image|>")
    return kind(images(size=size, **PATCHES), tokens, no_video(), chat_template=template)


def got_ocr2() -> ProcessorMixin:
    images = GotOcr2ImageProcessorPil(size=LARGE)
    reader = GotOcr2Processor(images, tokenizer(pad="<imgpad>"), chat_template=chatml("<img><imgpad></img>"))
    reader.num_image_tokens = 16
    reader.images_kwargs = {"crop_to_patches": True, "max_patches": 4}
    return reader


def granite_docling() -> ProcessorMixin:
    images = GraniteDoclingImageProcessorPil(size=SQUARE, max_patches=4)
    return GraniteDoclingProcessor(images, tokenizer(), image_seq_len=4, chat_template=IDEFICS_3)


def hunyuan_vl() -> ProcessorMixin:
    tokens = tokenizer(image_token="<image>", image_start_token="<img>", image_end_token="</img>")
    images = HunYuanVLImageProcessorPil(size=PIXELS, patch_size=8, merge_size=2)
    return HunYuanVLProcessor(images, tokens, chat_template=chatml("<img><image></img>"))


def idefics2() -> ProcessorMixin:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=True)
    tokens = tokenizer(image_token="<image>", image_boundary_token="<fake_token_around_image>")
    return Idefics2Processor(images, tokens, image_seq_len=4, chat_template=IDEFICS_3)


def janus() -> ProcessorMixin:
    tokens = tokenizer(image_token="<image>", boi_token="<img>", eoi_token="</img>")
    images = JanusImageProcessorPil(size=SQUARE)
    return JanusProcessor(images, tokens, CHATML, use_default_system_prompt=True, num_image_tokens=16)


def lighton_ocr() -> ProcessorMixin:
    tokens = tokenizer(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=PATCH)
    return LightOnOcrProcessor(images, tokens, patch_size=8, spatial_merge_size=2, chat_template=chatml("[IMG]"))


def llava_next_video() -> ProcessorMixin:
    settings = {"vision_feature_select_strategy": "full", "chat_template": CHATML}
    return LlavaNextVideoProcessor(no_video(), pinpoints(), tokenizer(), patch_size=8, **settings)


def mllama() -> ProcessorMixin:
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4)
    return MllamaProcessor(images, tokenizer(image_token="<image>"), chat_template=CHATML)


def ovis2() -> ProcessorMixin:
    named = {f"indicator_{number}": token for number, token in enumerate(OVIS)}
    images = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    tokens = tokenizer(atom="<IMG_ATOM>", **named)
    return Ovis2Processor(images, tokens, chat_template=CHATML, image_seq_length=16)


def paddleocr_vl() -> ProcessorMixin:
    images = PaddleOCRVLImageProcessorPil(size=PIXELS, patch_size=8, merge_size=2)
    return PaddleOCRVLProcessor(images, tokenizer(image_token="<image>"), chat_template=CHATML)


def qianfan_ocr() -> ProcessorMixin:
    tokens = tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    return QianfanOCRProcessor(images, tokens, image_seq_length=4, chat_template=CHATML)


def qwen(kind: type[ProcessorMixin]) -> ProcessorMixin:
    """Processors of their own around Qwen's image processor."""
    images = Qwen2VLImageProcessorPil(size=PIXELS, **PATCHES)
    return kind(images, tokenizer(), no_video(), chat_template=chatml(QWEN))


def video_llama_3() -> ProcessorMixin:
    images = VideoLlama3ImageProcessorPil(size=PIXELS, patch_size=8, merge_size=1)
    return VideoLlama3Processor(images, tokenizer(), no_video(), chat_template=chatml("<|image_pad|>"))


def video_llava() -> ProcessorMixin:
    images = VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    return VideoLlavaProcessor(images, no_video(), tokenizer(), patch_size=8, chat_template=CHATML)


MORE: dict[str, Callable[[], ProcessorMixin]] = {
    "aria": aria,
    "aya_vision": aya_vision,
    "cohere_compass": cohere_compass,
    "cosmos3_edge": cosmos3_edge,
    "deepseek_vl": deepseek_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "exaone4_5": lambda: qwen(Exaone4_5_Processor),
    "glm46v": lambda: glm(Glm46VProcessor, Glm46VImageProcessorPil),
    "glm4v": lambda: glm(Glm4vProcessor, Glm4vImageProcessorPil),
    "glm4v_moe": lambda: glm(Glm4vProcessor, Glm4vImageProcessorPil),
    "got_ocr2": got_ocr2,
    "granite_docling": granite_docling,
    "hunyuan_vl": hunyuan_vl,
    "hyperclovax_vision_v2": lambda: qwen(HyperCLOVAXVisionV2Processor),
    "idefics2": idefics2,
    "janus": janus,
    "lfm3_vl": lambda: qwen(Lfm3VlProcessor),
    "lighton_ocr": lighton_ocr,
    "llava_next_video": llava_next_video,
    "mllama": mllama,
    "ovis2": ovis2,
    "paddleocr_vl": paddleocr_vl,
    "qianfan_ocr": qianfan_ocr,
    "qwen3_5": lambda: qwen(Qwen3VLProcessor),
    "qwen3_5_moe": lambda: qwen(Qwen3VLProcessor),
    "qwen3_vl_moe": lambda: qwen(Qwen3VLProcessor),
    "video_llama_3": video_llama_3,
    "video_llava": video_llava,
    "vipllava": templates.llava,
}

FAMILIES = {**templates.FAMILIES, **MORE}
IMAGE_NEEDED = ("got_ocr2", "paligemma")  # they refuse a question without an image
MIXED_UP = ("hunyuan_vl",)  # its model numbers the images of a batch, not those of a record: transformers 5.23


def processor(family: str) -> ProcessorMixin:
    """The family's processor; dummies for its video processor are allowed."""
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
    "llava_next_video": {**_WHOLE, "image_grid_pinpoints": PINPOINTS},
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
