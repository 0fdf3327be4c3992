from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from tests.trainer.shards import jpeg, picture
from trainer.evaluate.__main__ import main
from trainer.evaluate.classes import EvaluationError, open_labelled
from trainer.evaluate.retrieval import ranks
from trainer.evaluate.zeroshot import accuracy


def test_accuracy_by_hand() -> None:
    scores = torch.tensor([[9, 1, 2, 0, 0, 0], [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 9, 0, 0.0]])
    result = accuracy(scores, torch.tensor([0, 0, 5, 3]))
    assert result == {"acc1": 0.75, "acc5": 0.75, "mean_per_class_recall": pytest.approx(2 / 3)}
    assert accuracy(scores[:, :3], torch.tensor([0, 0, 0, 1]))["acc5"] is None


def test_ranks_are_those_of_a_stable_sort() -> None:
    torch.manual_seed(0)
    queries, candidates = torch.randn(1500, 4), torch.randn(1500, 4)
    order = (queries @ candidates.T).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(ranks(queries, candidates), (order == torch.arange(1500)[:, None]).int().argmax(dim=1))


def test_a_collapsed_model_does_not_look_perfect() -> None:
    same = torch.ones(50, 4)
    assert ranks(same, same).float().mean() > 20


def test_webdataset_layout(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("red thing\nblue thing\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for i, (label, colour) in enumerate([("0", "red"), ("1", "blue")]):
            for ending, data in (("cls", label.encode()), ("png", jpeg(picture(colour, i), "PNG"))):
                member = tarfile.TarInfo(f"s{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = open_labelled(tmp_path, None)
    assert (data.names, data.templates) == (["red thing", "blue thing"], ["a {c}"])
    assert [label for _, label in data] == [0, 1]
    (tmp_path / "classnames.txt").write_text("red thing\n")
    with pytest.raises(EvaluationError, match="class 1, but there are 1 class names"):
        list(open_labelled(tmp_path, None))


def test_folder_layout_and_its_mistakes(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="neither"):
        open_labelled(tmp_path, None)
    for name in ("red_square", "blue_circle"):
        (tmp_path / name).mkdir()
        picture("red", 0).save(tmp_path / name / "a.JPG", "JPEG")
    data = open_labelled(tmp_path, None)
    assert data.names == ["blue circle", "red square"]
    assert [label for _, label in data] == [0, 1]
    with pytest.raises(EvaluationError, match="3 class names for 2 folders"):
        open_labelled(tmp_path, ["a", "b", "c"])
    (tmp_path / "red_square" / "b.png").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"b\.png"):
        list(data)


def test_a_wrong_command_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zeroshot", "--model", "ViT-B-23", "--data", str(tmp_path)]) == 2
    assert "ViT-B-32" in capsys.readouterr().err
