"""A tiny dual encoder with random weights, as a folder that every command loads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from trainer.export import export
from trainer.features import Encoder
from trainer.model import create, load, model_config

ARCHITECTURE = "scorer-64"
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
COCA = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32, "output_tokens": True,
        "attentional_pool": True, "attn_pooler_heads": 2,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT,
    "custom_text": True,
}  # fmt: skip
"""An open_clip configuration with a text decoder, which a contrastive loss does not train."""


def write_model(out: Path) -> str:
    torch.manual_seed(0)
    model, preprocess, _ = create(ARCHITECTURE)
    state = {"model": model.state_dict(), "model_config": model_config(ARCHITECTURE)}
    export({**state, "preprocess_config": preprocess.config}, out)
    return str(out)


@cache
def encoder_of(folder: str) -> Encoder:
    return Encoder(*load(folder), batch_size=8)
