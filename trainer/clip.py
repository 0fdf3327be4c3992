"""Trained models behind openai/CLIP's interface; `import trainer` exports the three functions."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from trainer import model as models
from trainer.model import Clip, Preprocess, open_clip


class CLIP(nn.Module):
    """A dual encoder with openai/CLIP's interface: `model(image, text)` gives logits; features are not normalised."""

    def __init__(self, net: Clip, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype
        self.context_length: int = net.context_length

    def encode_image(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), as `preprocess` makes them, to features (B, embed_dim)."""
        features: Tensor = self.net.encode_image(image.to(self.dtype))
        return features

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (B, context_length) to features (B, embed_dim)."""
        return models.encode_text(self.net, text)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (images, texts), the cosines divided by the temperature, and their transpose."""
        images = nn.functional.normalize(self.encode_image(image), dim=-1)
        texts = nn.functional.normalize(self.encode_text(text), dim=-1)
        logits = self.net.logit_scale.exp() * images @ texts.T
        if (bias := getattr(self.net, "logit_bias", None)) is not None:
            logits = logits + bias
        return logits, logits.T


def available_models() -> list[str]:
    """OpenAI's model names, such as `ViT-B/32`; the weights are downloaded on first use."""
    return list(_published())


def load(
    name: str, device: str | torch.device | None = None, pretrained: str | None = None
) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """Loads a model in evaluation mode; also returns the function from a picture to its tensor (3, H, W).

    `name` is one of `available_models()` (OpenAI's weights), a folder written by `trainer.export`, or an open_clip
    architecture; only an architecture needs `pretrained`, the tag or file of its weights. `device` defaults to a GPU if
    there is one. On a GPU the weights are fp16, as in openai/CLIP. Raises ModelError.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    published = _published()
    if pretrained is None and name in published:
        name, pretrained = published[name], "openai"
    precision = "fp16" if device.type == "cuda" else "fp32"
    net, preprocess, _ = models.load(name, pretrained, device, precision)
    # Preprocessing one picture runs on the CPU; the caller stacks and moves them.
    single = Preprocess(preprocess.config, torch.device("cpu"), torch.float32)
    return CLIP(net, models.DTYPES[precision]).eval(), lambda image: single([image])[0]


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Token ids, int32 (texts, context_length), between the start and end tokens and zero-padded.

    The vocabulary is CLIP's; a model with its own tokenizer needs the one that `trainer.model.load` returns.
    Raises RuntimeError if a text is too long and `truncate` is false.
    """
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    texts = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(result, texts):
        tokens = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
        if len(tokens) > context_length:
            if not truncate:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}")
            tokens = [*tokens[: context_length - 1], tokenizer.eot_token_id]
        row[: len(tokens)] = torch.tensor(tokens)
    return result


def _published() -> dict[str, str]:
    """Maps openai/CLIP's model names to open_clip's: `ViT-L/14@336px` to `ViT-L-14-336`."""
    ours = [name for name, tag in open_clip.list_pretrained() if tag == "openai" and not name.endswith("-quickgelu")]
    return {re.sub(r"^ViT-(\w+)-(\d+)", r"ViT-\1/\2", name).replace("-336", "@336px"): name for name in ours}
