from __future__ import annotations

import json

import pytest

from pipeline.stages.clip_score import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small, untrained dual encoder. All scores are defined and distinct."""
    import torch
    from safetensors.torch import save_file

    from trainer.model import create, model_config

    torch.manual_seed(0)
    model, preprocess, _ = create("tiny-64")
    folder = tmp_path_factory.mktemp("tiny")
    config = {"model_cfg": model_config("tiny-64"), "preprocess_cfg": preprocess.config}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS_FILE)
    return str(folder)
