from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import trainer
from tests.trainer.shards import picture
from trainer.model import ModelError, load, open_clip


def test_importing_the_trainer_imports_no_torch() -> None:
    code = "import sys, trainer; assert trainer.load and 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_available_models_are_those_of_openai() -> None:
    assert trainer.available_models() == [
        *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
        *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"),
    ]


def test_a_model_name_loads_openais_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def spy(name: str, **options: str) -> None:
        seen.append((name, options["pretrained"]))
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", spy)
    for name in ("ViT-L/14@336px", "RN50x4"):
        with pytest.raises(ModelError, match="Without a network"):
            trainer.load(name, device="cpu")
    assert seen == [("ViT-L-14-336", "openai"), ("RN50x4", "openai")]


def test_tokenize() -> None:
    texts = ["a diagram", "Two  CATS &amp; a dog"]
    tokens = trainer.tokenize(texts)
    assert tokens.dtype == torch.int
    assert torch.equal(tokens.long(), open_clip.get_tokenizer("ViT-B-32")(texts))
    assert torch.equal(trainer.tokenize("a diagram"), tokens[:1])
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        trainer.tokenize("word " * 76)
    assert trainer.tokenize("word " * 75)[0].count_nonzero() == 77
    cut = trainer.tokenize("word " * 100, truncate=True)
    assert torch.equal(cut, trainer.tokenize("word " * 75))
    assert trainer.tokenize("a", context_length=9).shape == (1, 9)


def test_the_model_is_that_of_the_folder(model: str) -> None:
    clip, preprocess = trainer.load(model, device="cpu")
    net, batch_preprocess, tokenizer = load(model)
    assert not clip.training
    pictures = [picture("red", 0, (90, 70)), picture("blue", 1)]
    image = torch.stack([preprocess(one) for one in pictures])
    assert image.shape == (2, 3, 64, 64)
    assert torch.equal(image, batch_preprocess(pictures))
    texts = ["a red picture", "blue", "x"]
    tokens = trainer.tokenize(texts, context_length=clip.context_length)
    with torch.no_grad():
        per_image, per_text = clip(image, tokens)
        assert torch.allclose(clip.encode_image(image), net.encode_image(image))
        assert torch.allclose(clip.encode_text(tokens), net.encode_text(tokenizer(texts)), atol=1e-5)
        images, words = net.encode_image(image, normalize=True), net.encode_text(tokenizer(texts), normalize=True)
        assert torch.allclose(per_image, net.logit_scale.exp() * images @ words.T, atol=1e-4)
    assert torch.equal(per_text, per_image.T)
