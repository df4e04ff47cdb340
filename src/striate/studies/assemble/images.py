"""Image preprocessing: that of the tower, or padding to a square first."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

Aspect = Literal["square", "pad"]
"""`image_aspect_ratio` of the originals: crop (CLIP) or squeeze (SigLIP) to a square, or pad with the mean color."""


def for_tower(vision: PreTrainedConfig) -> Any:
    """The image processor that a CLIP or SigLIP encoder was trained with, at its image size."""
    square = {"height": vision.image_size, "width": vision.image_size}
    if vision.model_type.startswith("siglip"):
        return SiglipImageProcessorPil(size=square, crop_size=square)
    return CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=square)


def pad_to_square(processor: Any) -> LlavaImageProcessorPil:
    """The same resizing and normalization after padding to a square with the mean color."""
    kept = ("resample", "do_center_crop", "image_mean", "image_std", "rescale_factor")
    settings: dict[str, Any] = {name: getattr(processor, name, None) for name in kept}
    settings["do_center_crop"] = bool(settings["do_center_crop"])
    for name, size in (
        ("size", processor.size),
        ("crop_size", getattr(processor, "crop_size", None) or processor.size),
    ):
        settings[name] = {key: value for key, value in dict(size).items() if value is not None}
    return LlavaImageProcessorPil(do_pad=True, **settings)
