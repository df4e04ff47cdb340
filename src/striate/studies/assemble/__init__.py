"""New LVLMs as plain LLaVA checkpoints: joined from two trained parts, or imported from the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from striate.errors import UserError, at_least, check_seed
from striate.roundtrip import verify
from striate.runs.run import Run
from striate.studies.assemble import parts
from striate.studies.assemble.importing import export_projector as write_projector
from striate.studies.assemble.importing import import_original, load_projector
from striate.studies.assemble.processor import Aspect, pad_to_square, wording
from striate.vlm import Vlm
from striate.vlm.reading import keep_prefixes
from striate.vlm.template import set_stop_tokens

__all__ = ["assemble"]


def assemble(
    *,
    out: Path,
    vision: str | None = None,
    llm: str | None = None,
    projector: Path | None = None,
    import_: str | None = None,
    export_projector: str | None = None,
    template: Literal["vicuna_v1", "bunny_llama3", "bunny_phi3", "plain"] | None = None,
    aspect: Aspect | None = None,
    feature_layer: int | None = None,
    pool: int = 1,
    image_size: int = 224,
    patch_size: int = 16,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    seed: int = 0,
) -> Run:
    """Join a vision encoder and a language model into an LVLM, or import an original LLaVA-1.5 or Bunny checkpoint.

    Args:
        out: the run folder to write; the model is in its checkpoint/.
        vision: a HF vision model (folder or hub id; of CLIP and SigLIP the vision half is taken), or the size of a
            fresh SigLIP tower: tiny, small, base. With --import: where the checkpoint has no tower of its own.
        llm: a HF language model (folder or hub id) or a .gguf file. With --import: the base of LoRA deltas, and what
            a stage-1 projector was trained for.
        projector: trained weights of the projector: safetensors, or an mm_projector.bin of LLaVA or Bunny; default:
            fresh.
        import_: an original checkpoint (folder or hub id): a whole llava-v1.5 or Bunny, LoRA deltas, or a stage-1
            projector; its code is never run.
        export_projector: a model whose projector to write in the format of LLaVA and Bunny: mm_projector.bin and
            config.json in --out/checkpoint/, and nothing else.
        template: wording of a chat: vicuna_v1, bunny_llama3, bunny_phi3, or plain (image and caption, for align);
            default: the language model's own, or the imported model's.
        aspect: pad images to a square first, or square (crop or squeeze them as the tower does); default: the tower's
            way, or the imported model's.
        feature_layer: which hidden state of the tower feeds the projector; default: -2 as LLaVA and Bunny do for a
            trained tower, -1 for a fresh one.
        pool: 2 joins every 2x2 square of patches into one image token, 1 keeps them all.
        image_size: pixels per side, for a fresh tower.
        patch_size: pixels per side, for a fresh tower.
        dtype: of the saved weights: bfloat16, float16 or float32; default: bfloat16, or as the imported are stored.
        seed: of the fresh weights.

    Raises:
        UserError: a part cannot be loaded, or the parts do not fit together.
    """
    if export_projector is not None:
        return write_projector(export_projector, out)
    if import_ is not None:
        if projector or feature_layer is not None or pool != 1:
            raise UserError("--import takes over projector, feature layer and pool: leave these options out")
        return import_original(
            import_, out=out, vision=vision, llm=llm, template=template, aspect=aspect, dtype=dtype
        )  # fmt: skip
    if vision is None or llm is None:
        raise UserError("give --vision and --llm to join them, or --import to read an original checkpoint")
    if pool not in (1, 2):
        raise UserError(f"pool is {pool}: 1 keeps every patch, 2 joins 2x2 patches into one token")
    at_least(1, patch_size=patch_size)
    at_least(patch_size * pool, image_size=image_size)
    check_seed(seed)
    Run.check_free(out)
    torch.manual_seed(seed)
    tower, image_processor, fresh = parts.tower(vision, image_size=image_size, patch_size=patch_size)
    language, tokenizer = parts.language_model(llm)
    parts.add_image_token(tokenizer, language)
    talk = wording(template, tokenizer)
    layer = feature_layer if feature_layer is not None else (-1 if fresh else -2)
    states = tower.config.num_hidden_layers + 1
    if not -states <= layer < states:
        raise UserError(f"--feature-layer {layer}: the tower has {states} hidden states, {-states} to {states - 1}")
    options = {
        "vision": vision, "llm": llm, "projector": projector, "template": template, "aspect": aspect,
        "feature_layer": layer, "pool": pool, "image_size": image_size, "patch_size": patch_size, "dtype": dtype,
    }  # fmt: skip
    run = Run.create(out, verb="assemble", options=options, seed=seed)
    with run.recording():
        model = parts.join(tower, language, tokenizer, layer=layer, pool=pool)
        if projector:
            load_projector(model.get_submodule(*Vlm.of(model).parts.projector), projector)
        if aspect == "pad":
            image_processor = pad_to_square(image_processor)
        process = parts.processor(tokenizer, image_processor, model.config, pool=pool, template=talk.template)
        set_stop_tokens(model.generation_config, process)
        for tensor in model.state_dict(keep_vars=True).values():  # unsaved buffers (rotary frequencies) stay in float32
            tensor.data = tensor.data.to(getattr(torch, dtype or "bfloat16"))
        keep_prefixes(model, ("vision_tower",))
        model.save_pretrained(run.checkpoint)
        process.save_pretrained(run.checkpoint)
        vlm = Vlm.of(model, source=str(run.checkpoint))
        run.update(depth=vlm.depth, parameters=model.num_parameters())
        if note := verify(vlm, run.checkpoint):
            run.warn(note)
    return run
