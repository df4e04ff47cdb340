"""What a training step costs: striate's region, by default settings, against the usual recipes, side by side.

    python bench/train.py --out bench/results/train.json                              # SmolLM2-135M's shape
    python bench/train.py --shape 7b --device cuda --out bench/results/train-gpu.json   # a 7B shape, on a GPU

Random weights, generated images and words. Every contestant trains on the same records with the same tokens, in a
process of its own; they take turns, and each turn counts the steps behind the first. Contestants:

    all          transformers' Trainer, peft LoRA r 128 on all layers, padded batches of like length, all logits: the
                 recipe of LLaVA and Bunny; `all-recomputed` the same with gradient checkpointing
    all-trl      TRL's SFTTrainer with the same adapters, as its documentation has it
    region       the Trainer with LoRA r 128 on `uniform:25%` and the projector (full) (striate.lora_config)
    striate      striate's defaults for `uniform:25%`
    striate-*    the same with one thing changed (striate-cudnn: with cuDNN's attention, where a GPU has it)

The JSON is written again after every contestant. `bench/gpu.sh` runs what a GPU has to show.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import striate
from striate.data import IGNORED, Batch, Examples, Records, collate, read
from striate.routing import resolve
from striate.train import TUNE, trainable_parameters
from striate.train.fit import Trained, fit
from striate.train.loop import Loop
from striate.train.memory import PeakMemory
from striate.train.optimizer import Group
from striate.train.records import length_grouped
from striate.vlm import Vlm, select
from striate.vlm.devices import has_native_bfloat16

WORDS = [f"word{index}" for index in range(2000)]
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<image>")
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}> {% for p in m.content %}{% if p.type == 'image' %}<image> "
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A model and its records: numbers of tokens are means, of log-normal lengths between a quarter and four times."""

    text: dict[str, Any]
    tower: dict[str, Any]
    question: int
    answer: int
    batch: int


SHAPES = {
    "tiny": Shape(  # for a look at this script
        text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False},
        tower={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
               "image_size": 32, "patch_size": 8},
        question=8, answer=8, batch=4,
    ),
    "135m": Shape(
        text={"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        tower={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
               "image_size": 64, "patch_size": 8},
        question=32, answer=16, batch=16,
    ),
    "135m-576": Shape(  # the same with LLaVA's number of image tokens
        text={"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        tower={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
               "image_size": 192, "patch_size": 8},
        question=64, answer=64, batch=4,
    ),
    "7b": Shape(
        text={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False},
        tower={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 336, "patch_size": 14},
        question=64, answer=64, batch=16,
    ),
}  # fmt: skip


def build(shape: Shape, device: torch.device, dtype: torch.dtype, *, depth: int | None = None) -> Vlm:
    """A LLaVA of that shape with random weights, and a processor for it."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "max_position_embeddings": 4096, **shape.text}
    config = AutoConfig.for_model(
        "llava", text_config=text | ({"num_hidden_layers": depth} if depth else {}),
        vision_config={"model_type": "siglip_vision_model", **shape.tower}, image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=shape.text["tie_word_embeddings"],
    )  # fmt: skip
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return Vlm.of(model.to(device), processor(shape))


def processor(shape: Shape) -> LlavaProcessor:
    """One word per token; images in the size of the tower."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(SPECIAL[4:]),
    )  # fmt: skip
    side = shape.tower["image_size"]
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": side, "width": side}), tokenizer=fast,
        patch_size=shape.tower["patch_size"], vision_feature_select_strategy="full", chat_template=TEMPLATE,
    )  # fmt: skip


def write_records(folder: Path, shape: Shape, number: int) -> Path:
    """Records with one image each, as a LLaVA-style JSON file."""
    draw = random.Random(0)
    rows = []

    def words(mean: int) -> str:
        length = min(4 * mean, max(mean // 4, round(draw.lognormvariate(0, 0.5) * mean * 0.88)))
        return " ".join(draw.choice(WORDS) for _ in range(length))

    for index in range(number):
        name = f"{index}.jpg"
        Image.frombytes("RGB", (320, 240), draw.randbytes(3 * 320 * 240)).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{words(shape.question)}"}]
        rows.append(
            {"id": str(index), "image": name, "conversations": [*turns, {"from": "gpt", "value": words(shape.answer)}]}
        )
    path = folder / "train.json"
    path.write_text(json.dumps(rows))
    return path


class Steps(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())


class Padded(Trainer):
    """The plain Trainer; batches are of like length, as LLaVA's recipe groups them."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return length_grouped(self.train_dataset.lengths, self.args.train_batch_size, 0)


def by_trainer(vlm: Vlm, records: Records, about: About, *, region: str, recompute: bool = False) -> Measured:
    """peft and the Trainer."""
    network = add_adapters(vlm, region)
    steps = Steps(vlm.device)
    trainer = Padded(
        model=network, args=arguments(about, gradient_checkpointing=recompute),
        train_dataset=Examples(records.records, vlm.processor),
        data_collator=partial(_inputs, pad_id=vlm.pad_token_id), callbacks=[steps],
    )  # fmt: skip
    return measure(trainer.train, steps, vlm, about)


def _inputs(examples: list[Any], pad_id: int) -> dict[str, torch.Tensor]:
    batch = collate(examples, pad_id=pad_id)
    return {**batch.inputs, "labels": batch.labels}


def add_adapters(vlm: Vlm, region: str) -> nn.Module:
    """Adapters on the region, full training of the projector, trained weights in float32."""
    chosen = striate.Region.parse(region, vlm.depth)
    network = peft.get_peft_model(vlm.model, striate.lora_config(vlm, chosen))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def arguments(about: About, **settings: Any) -> TrainingArguments:
    """The arguments of LLaVA's recipe, without saving and reporting."""
    settings |= (
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if settings["gradient_checkpointing"] else {}
    )
    return TrainingArguments(
        output_dir=about.folder, max_steps=about.steps, per_device_train_batch_size=about.batch, learning_rate=2e-4,
        lr_scheduler_type="cosine", warmup_steps=0.03, bf16=about.dtype == "bfloat16", use_cpu=about.device == "cpu",
        logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True,
        dataloader_num_workers=0 if about.device == "cpu" else 8, **settings,
    )  # fmt: skip


def by_trl(vlm: Vlm, records: Records, about: About) -> Measured:
    """TRL's SFTTrainer on conversations, collated by itself."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": list(r.messages), "images": [str(image) for image in r.images]} for r in records.records]
    part = {"type": Value("string"), "text": Value("string")}
    features = {"messages": List({"role": Value("string"), "content": List(part)}), "images": List(ImageFeature())}
    steps = Steps(vlm.device)
    trainer = SFTTrainer(
        model=vlm.model, processing_class=vlm.processor, callbacks=[steps],
        train_dataset=Dataset.from_list(rows, features=Features(features)),
        peft_config=striate.lora_config(vlm, striate.Region.parse("all", vlm.depth)),
        args=SFTConfig(
            output_dir=about.folder, max_steps=about.steps, per_device_train_batch_size=about.batch, max_length=None,
            learning_rate=2e-4, report_to="none", save_strategy="no", bf16=about.dtype == "bfloat16",
            use_cpu=about.device == "cpu", disable_tqdm=True, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    return measure(trainer.train, steps, vlm, about)


def by_striate(
    vlm: Vlm,
    records: Records,
    about: About,
    *,
    region: str = "uniform:25%",
    projector: bool = True,
    lora: bool = False,
    route: str | None = None,
    cudnn: bool = False,
    **changes: Any,
) -> Measured:
    """striate's own training loop, as `tune` calls it."""
    if cudnn:
        torch.backends.cuda.enable_cudnn_sdp = lambda _: None  # left as PyTorch has it
    chosen = striate.Region.parse(region, vlm.depth)
    options = replace(
        TUNE, steps=about.steps, batch=about.batch, micro_batch=about.batch, dtype=about.dtype, device=about.device,
        **changes,
    )  # fmt: skip
    if lora:
        from striate.train.adapter import adapt

        network, named = adapt(vlm, chosen, projector=projector, rank=128, alpha=256, dropout=0.05)
    else:
        network, named = vlm.model, trainable_parameters(vlm, select(vlm, chosen, projector=projector))
    groups = {part: Group(parameters, 2e-5) for part, parameters in named.items()}
    trained: list[Trained] = []
    routed = resolve(route, chosen)
    found = measure(
        lambda: trained.append(fit(vlm, network, chosen, records, groups, options, route=routed)), None, vlm, about
    )  # fmt: skip
    ends = [entry["seconds"] for entry in trained[0].log.history]
    summary = {name: trained[0].to_json()[name] for name in ("data_wait", "packing", "recomputed_layers")}
    summary["losses"] = [entry["loss"] for entry in trained[0].log.history]
    if vlm.device.type == "cuda":
        summary["reserved_gb"] = torch.cuda.max_memory_reserved(vlm.device) / 1e9
    return replace(found, seconds=[b - a for a, b in itertools.pairwise(ends)], training=summary)


@dataclass(frozen=True)
class About:
    """What all contestants have in common."""

    shape: str
    device: str
    dtype: str
    steps: int
    batch: int
    folder: str
    depth: int | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds of each step behind the first, and the peak memory: of the whole process, and above what the model and
    the interpreter held before training."""

    seconds: list[float]
    peak_gb: float
    above_rest_gb: float
    training: dict[str, Any] | None = None


def measure(train: Callable[[], Any], steps: Steps | None, vlm: Vlm, about: About) -> Measured:
    """Train, with the clock and the memory watched."""
    memory = PeakMemory(vlm.device)
    memory.start()
    rest = memory.gigabytes()
    train()
    ends = steps.ends if steps else []
    peak = memory.gigabytes()
    return Measured([b - a for a, b in itertools.pairwise(ends)], peak, peak - rest)


CONTESTANTS: dict[str, Callable[[Vlm, Records, About], Measured]] = {
    "all": partial(by_trainer, region="all"),
    "all-recomputed": partial(by_trainer, region="all", recompute=True),
    "all-trl": by_trl,
    "region": partial(by_trainer, region="uniform:25%"),
    "striate": by_striate,
    "striate-routed": partial(by_striate, route="same"),
    "striate-cudnn": partial(by_striate, cudnn=True),
    "striate-lora": partial(by_striate, lora=True),
    "striate-padded": partial(by_striate, packing="off"),
    "striate-recomputed": partial(by_striate, checkpointing="all"),
    "striate-projector-frozen": partial(by_striate, projector=False),
    "striate-later": partial(by_striate, projector=False, region="uniform:8@2"),
    "striate-all": partial(by_striate, region="all"),
}


def one(name: str, about: About, memory: float | None) -> None:
    """Measure one contestant in this process, and print what was found as the last line."""
    shape, device = SHAPES[about.shape], torch.device(about.device)
    if memory:
        limit_memory(memory, device)
    number = about.batch * (about.steps + 1)
    data = write_records(Path(about.folder), shape, number)
    transformers.utils.logging.set_verbosity_error()
    vlm = build(shape, device, getattr(torch, about.dtype), depth=about.depth)
    _ = vlm.processor  # tried on the model before trained weights have another dtype
    found = CONTESTANTS[name](vlm, read(data), about)
    print(json.dumps(vars(found)))


def limit_memory(gigabytes: float, device: torch.device) -> None:
    """Leave this process so much of the GPU. A CPU has no such limit: there the first pass of the training fails."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.mem_get_info(device)[1], device)
        return
    real, calls = Loop._forward_backward_one, itertools.count()

    def fail_first(*arguments: Any, **settings: Any) -> torch.Tensor:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("as on a small GPU")
        return real(*arguments, **settings)

    Loop._forward_backward_one = fail_first


def step_of(about: About, folder: str) -> tuple[Vlm, Batch]:
    """The model and one step's records as one batch."""
    shape, device = SHAPES[about.shape], torch.device(about.device)
    vlm = build(shape, device, getattr(torch, about.dtype), depth=about.depth)
    examples = Examples(read(write_records(Path(folder), shape, about.batch)).records, vlm.processor)
    batch = collate([examples[index] for index in range(len(examples))], pad_id=vlm.pad_token_id)
    return vlm, batch.to(device)


def floor(vlm: Vlm, batch: Batch, about: About) -> dict[str, float]:
    """FLOPs that a step of striate's must do, the rate of GEMMs here, and the seconds that makes."""
    from torch.utils.flop_counter import FlopCounterMode

    from striate.train.loss import FastPaths, answer_losses
    from striate.train.packing import record_by_record

    device, shape = torch.device(about.device), SHAPES[about.shape]
    trainable_parameters(vlm, select(vlm, striate.Region.parse("uniform:25%", vlm.depth)))
    cast = torch.autocast(device.type, torch.bfloat16, enabled=about.dtype == "bfloat16")
    with FlopCounterMode(display=False) as counter, record_by_record(vlm), cast:
        answer_losses(vlm, vlm.model, batch, fast_paths=FastPaths(True, True)).mean().backward()
    width, dtype = shape.text["hidden_size"], getattr(torch, about.dtype)
    left = torch.randn(int(batch.inputs["attention_mask"].sum()), width, dtype=dtype, device=device)
    right = torch.randn(shape.text["intermediate_size"], width, dtype=dtype, device=device)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        for _ in range(5):
            left @ right.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - began) / 5)
    rate = 2 * left.numel() * len(right) / median(seconds)
    flops = counter.get_total_flops()
    return {"flops": flops, "tokens": len(left), "flops_per_second": rate, "seconds": flops / rate}


def predict(vlm: Vlm, batch: Batch, about: About) -> float:
    """The seconds per step that `striate cost` predicts from the config, the mean lengths and the measured machine."""
    from striate.studies.cost import Counts, Setup, this_machine  # needs matplotlib and rich
    from striate.studies.cost.fake_model import fake_model_of

    answers, pictured = int((batch.labels != IGNORED).sum()), int(batch.image_mask.sum())
    texts = int(batch.inputs["attention_mask"].sum()) - answers - pictured
    setup = Setup(
        "full", batch=about.batch, micro_batch=about.batch, image_tokens=pictured // about.batch,
        text_tokens=round(texts / about.batch), answer_tokens=round(answers / about.batch),
    )  # fmt: skip
    dtype = "bfloat16" if about.dtype == "bfloat16" else "float32"
    fake = fake_model_of(vlm.model.config, kept_as=getattr(torch, about.dtype), dtype=dtype)
    step = Counts(fake, setup).step(striate.Region.parse("uniform:25%", vlm.depth))
    return step.seconds(*this_machine(dtype).reached)


def take_turns(
    names: list[str], about: About, turns: int, *, limit: float | None, more: list[str]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Every contestant once a turn, each time in a new process, for at most `limit` seconds; yields what is found."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names:
            if name == "all-trl" and turn:
                continue
            line = [sys.executable, __file__, "--one", name, "--shape", about.shape, "--device", about.device,
                    "--dtype", about.dtype, "--steps", str(about.steps), "--batch", str(about.batch),
                     *(["--depth", str(about.depth)] if about.depth else []), *more]  # fmt: skip
            try:
                done = subprocess.run(line, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                print(f"{name}: more than {limit} s", flush=True)
                continue
            if done.returncode:
                print(f"{name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
                continue
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"turn {turn + 1}: {name:26} {median(found[name][-1]['seconds']):8.2f} s per step", flush=True)
            yield {name: _summary(results, about) for name, results in found.items() if results}


def _summary(results: list[dict[str, Any]], about: About) -> dict[str, Any]:
    step = median(median(result["seconds"]) for result in results)
    return {
        "seconds_per_step": step,
        "records_per_second": about.batch / step,
        "peak_gb": median(result["peak_gb"] for result in results),
        "above_rest_gb": median(result["above_rest_gb"] for result in results),
        "all_seconds": [result["seconds"] for result in results],
        "training": results[-1]["training"],
    }


def compare(found: dict[str, dict[str, Any]]) -> None:
    """Ratios: to the better of the all-layer recipes, and to the Trainer on the same region, where those ran."""
    recipes = [found[name] for name in ("all", "all-recomputed") if name in found]
    best = min(recipes, key=lambda one: one["seconds_per_step"], default=None)
    for one in found.values():
        if best:
            one["speedup_vs_all_layer_lora"] = best["seconds_per_step"] / one["seconds_per_step"]
            one["memory_ratio"] = one["peak_gb"] / best["peak_gb"]
        if "region" in found:
            one["speedup_vs_same_region"] = found["region"]["seconds_per_step"] / one["seconds_per_step"]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: what striate would take here")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per turn; the first does not count")
    parser.add_argument("--batch", type=int, help="records per step; default: the shape's")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--depth", type=int, help="decoder layers; default: the shape's")
    parser.add_argument("--limit", type=float, help="seconds for each contestant; default: no limit")
    parser.add_argument("--less-than", type=Path, help="an earlier result: striate gets 85 %% of what it took there")
    parser.add_argument("--memory", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if has_native_bfloat16(device) else "float32")
    batch = options.batch or SHAPES[options.shape].batch
    about = About(options.shape, options.device, dtype, options.steps, batch, "", options.depth)
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            one(options.one, replace(about, folder=folder), options.memory)
        return
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "shape": vars(SHAPES[about.shape]),
        "settings": {"dtype": dtype, "batch": about.batch, "turns": options.turns, "steps": about.steps - 1},
        "contestants": {},
    }

    def write() -> None:
        if options.out:
            options.out.write_text(json.dumps(report, indent=2) + "\n")

    earlier = json.loads(options.less_than.read_text())["contestants"]["striate"] if options.less_than else None
    more = ["--memory", str(0.85 * earlier["peak_gb"])] if earlier else []
    for found in take_turns(options.only, about, options.turns, limit=options.limit, more=more):
        compare(found)
        report["contestants"] = found
        write()
    for name, work in report["contestants"].items():
        ratios = f"{work['speedup_vs_all_layer_lora']:5.2f} x" if "memory_ratio" in work else ""
        print(f"{name:26} {work['seconds_per_step']:7.2f} s per step  {ratios}  peak {work['peak_gb']:6.2f} GB")
    if missing := [name for name in options.only if name not in report["contestants"]]:
        sys.exit(f"not measured: {', '.join(missing)}")
    if earlier:
        check_retry(report["contestants"]["striate"]["training"], earlier["training"])
        return
    with tempfile.TemporaryDirectory() as folder:
        vlm, batch = step_of(about, folder)
    report["floor"] = floor(vlm, batch, about)
    write()
    report["predicted"] = {"seconds": predict(vlm, batch, about)}
    if "striate" in report["contestants"]:
        ours = report["contestants"]["striate"]["seconds_per_step"]
        report["predicted"]["measured_to_predicted"] = ours / report["predicted"]["seconds"]
        report["floor"]["ratio"] = ours / report["floor"]["seconds"]
    write()
    print(f"floor {report['floor']['seconds']:.2f} s per step, predicted {report['predicted']['seconds']:.2f} s")


def check_retry(tight: dict[str, Any], roomy: dict[str, Any]) -> None:
    """With less memory, layers were recomputed, and the losses are the same but for rounding."""
    apart = max(abs(a / b - 1) for a, b in zip(tight["losses"], roomy["losses"], strict=True))
    recomputed = len(tight["recomputed_layers"])
    print(f"in less memory: {recomputed} layers recomputed, losses up to {apart:.1e} apart")
    if not recomputed or apart > 1e-2:
        sys.exit("not the same losses with recomputed layers")


if __name__ == "__main__":
    main()
