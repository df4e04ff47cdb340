"""What a process of the tests imports before it forks others (see `launch`), which then import and collect nothing."""
# ruff: noqa: F401

import gc

import accelerate.utils
import peft
import pico
import test_processes
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
import transformers.models.llava.modeling_llava

import striate.evaluation
import striate.runs.cli
import striate.scores

gc.collect()
gc.freeze()  # else each collection copies every page that a fork shares
