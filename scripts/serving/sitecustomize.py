"""Copied into the environment of vLLM: torchvision from PyPI is built for GPUs, and its operators do not load beside
torch for CPUs. It only has to find their names; image processors use none of them."""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
