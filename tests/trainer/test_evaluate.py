from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainer.labelled import labelled_members, write_folders
from tests.trainer.shards import COLOURS, jpeg, picture, samples, write_shards, write_tar
from trainer.data import Shards, ShardsError
from trainer.evaluate.__main__ import main
from trainer.evaluate.classes import open_labelled, read_templates
from trainer.evaluate.retrieval import aucs, recalls
from trainer.evaluate.zeroshot import accuracy
from trainer.features import Encoder, nearest
from trainer.model import open_clip
from trainer.samples import EvaluationError, Sample, read_pictures, webdataset_shards

CPU = torch.device("cpu")


def test_accuracy_by_hand() -> None:
    best = torch.tensor([[0, 2, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [3, 0, 1, 2, 4]])
    result = accuracy(best, torch.tensor([0, 0, 5, 3]), 6)
    assert result == {"acc1": 0.75, "acc5": 0.75, "mean_per_class_recall": pytest.approx(2 / 3)}
    assert accuracy(best[:, :3], torch.tensor([0, 0, 0, 1]), 3)["acc5"] is None


def test_zero_shot_equals_open_clip_step_by_step(model: str, evaluate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = write_folders(tmp_path / "data", 5)
    names = [*sorted(COLOURS), "striped", "dotted"]
    for name in names[4:]:
        (data / name).mkdir()
        picture("red", 7).save(data / name / "0.png")
    templates = ["a photo of a {c}.", "{c}", "a very {c} thing"]
    (tmp_path / "templates.txt").write_text("\n".join(templates))
    got = evaluate("zeroshot", "--data", data, "--templates", tmp_path / "templates.txt", "--batch-size", 3)

    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model}")
    net.eval()
    with torch.inference_mode():
        classes = [
            net.encode_text(tokenizer([t.format(c=n) for t in templates]), normalize=True) for n in sorted(names)
        ]
        weights = torch.stack([c.mean(dim=0) / c.mean(dim=0).norm() for c in classes])
        files = [(path, label) for label, n in enumerate(sorted(names)) for path in sorted((data / n).iterdir())]
        logits = torch.cat([net.encode_image(preprocess(Image.open(p))[None], normalize=True) for p, _ in files])
        order = (logits @ weights.T).argsort(dim=1, descending=True)
    labels = torch.tensor([label for _, label in files])
    right = order[:, 0] == labels
    assert got["acc1"] == pytest.approx(right.double().mean().item(), abs=1e-6)
    assert got["acc5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean().item(), abs=1e-6)
    by_class = [right[labels == label].double().mean().item() for label in range(6)]
    assert got["mean_per_class_recall"] == pytest.approx(sum(by_class) / 6, abs=1e-6)


def test_imagenets_eighty_templates() -> None:
    templates = read_templates("imagenet")
    assert len(templates) == 80
    assert templates[0] == "a bad photo of a {c}."
    assert all(template.count("{c}") == 1 for template in templates)


def test_recalls_are_those_of_a_full_sort_with_several_captions_an_image() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(60, 8), torch.randn(200, 8)
    owners = torch.cat([torch.arange(60), torch.randint(0, 60, (140,))]).sort().values
    got = recalls(images, texts, owners, CPU)
    scores = texts @ images.T
    for k in (1, 5, 10):
        best_images = scores.argsort(dim=1, descending=True)[:, :k]
        best_texts = owners[scores.T.argsort(dim=1, descending=True)[:, :k]]
        hit = (best_images == owners[:, None]).any(1), (best_texts == torch.arange(60)[:, None]).any(1)
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(hit[0].double().mean().item())
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(hit[1].double().mean().item())


def test_aucs_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.features.TILE", 13)  # several blocks, the last one smaller
    torch.manual_seed(0)
    images, owners = torch.randn(20, 8), torch.cat([torch.arange(20), torch.randint(0, 20, (27,))])
    texts = images[owners] + 3 * torch.randn(47, 8)
    images[3] = images[5]  # a tie
    scores = (texts @ images.T).tolist()
    for_texts = [
        (own > other) + (own == other) / 2
        for row, i in zip(scores, owners.tolist())
        for own in [row[i]]
        for j, other in enumerate(row)
        if j != i
    ]
    for_images = [
        (scores[own][i] > scores[other][i]) + (scores[own][i] == scores[other][i]) / 2
        for own, i in enumerate(owners.tolist())
        for other in range(47)
        if owners[other] != i
    ]
    got = aucs(images, texts, owners, CPU)
    assert 0.5 < got["image_retrieval_auc"] < 1
    assert got["image_retrieval_auc"] == pytest.approx(sum(for_texts) / len(for_texts))
    assert got["text_retrieval_auc"] == pytest.approx(sum(for_images) / len(for_images))


def test_a_single_image_has_no_auc() -> None:
    single = aucs(torch.ones(1, 4), torch.ones(3, 4), torch.zeros(3, dtype=torch.int64), CPU)
    assert single == {"image_retrieval_auc": None, "text_retrieval_auc": None}


def test_a_collapsed_model_does_not_look_perfect() -> None:
    same, owners = torch.ones(50, 4), torch.arange(50)
    assert recalls(same, same, owners, CPU)["image_retrieval_recall@10"] <= 0.2
    assert aucs(same, same, owners, CPU) == {"image_retrieval_auc": 0.5, "text_retrieval_auc": 0.5}


def test_nearest_in_tiles_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.features.TILE", 7)
    torch.manual_seed(0)
    queries, candidates = torch.randn(20, 4), torch.randn(33, 4)
    scores, numbers = nearest(queries, candidates, 5, CPU)
    want = (queries @ candidates.T).topk(5)
    assert torch.equal(numbers, want.indices)
    assert torch.allclose(scores, want.values)
    assert nearest(queries, candidates[:3], 5, CPU)[1].shape == (20, 3)


def test_retrieval_over_shards_and_over_clip_benchmarks_layout(evaluate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pairs = [(jpeg(picture(name, i)), f"{name} {i}") for i, name in enumerate(COLOURS)]
    shards = write_shards(tmp_path / "shards", pairs)
    members = [m for i, (p, c) in enumerate(pairs) for m in ((f"{i}.jpg", p), (f"{i}.txt", c.encode()))]
    write_tar(tmp_path / "wds" / "test" / "0.tar", members)
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("1\n")
    (tmp_path / "wds" / "dataset_type.txt").write_text("retrieval\n")
    one_each = evaluate("retrieval", "--data", shards)
    assert one_each == evaluate("retrieval", "--data", tmp_path / "wds")
    assert one_each["text_retrieval_recall@5"] == 1.0  # there are four
    # All captions belong to the first image: only that can be found by them, and it alone finds any.
    members = [("0.jpg", pairs[0][0]), ("0.txt", b"red\nblue\ngreen"), ("1.jpg", pairs[1][0]), ("1.txt", b"white\n")]
    write_tar(tmp_path / "wds" / "test" / "0.tar", members)
    assert set(evaluate("retrieval", "--data", tmp_path / "wds")) == set(one_each)


def test_webdataset_layout(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("\n".join(COLOURS))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    write_tar(tmp_path / "test" / "0.tar", labelled_members([0, 2]))
    write_tar(tmp_path / "train" / "0.tar", labelled_members([1]))
    data = open_labelled(tmp_path)
    assert (data.names, data.templates) == (list(COLOURS), ["a {c}"])
    assert [sample.label for sample in data] == [0, 2]
    assert [sample.label for sample in open_labelled(tmp_path, split="train")] == [1]
    (tmp_path / "classnames.txt").write_text("red thing\n")
    with pytest.raises(EvaluationError, match="class 2, but there are 1 class names"):
        list(open_labelled(tmp_path))


def test_shards_are_read_in_the_order_of_their_numbers_and_all_of_them(tmp_path: Path) -> None:
    for number in range(11):
        write_tar(tmp_path / f"{number}.tar", [])
    assert [path.stem for path in webdataset_shards(tmp_path)] == [str(number) for number in range(11)]
    (tmp_path / "nshards.txt").write_text("12")
    with pytest.raises(EvaluationError, match=r"11\.tar: missing"):
        webdataset_shards(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"0")], "no image or no .cls"),
        ([("a.cls", b"x"), ("a.jpg", b"")], "expected a whole number"),
    ],
)
def test_mistakes_in_a_tar_are_reported(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("red\n")
    with pytest.raises(EvaluationError, match=message):
        list(open_labelled(tmp_path))


def test_folder_layout_and_its_mistakes(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(EvaluationError, match="neither"):
        open_labelled(tmp_path)
    for name in ("red_square", "blue_circle"):
        (tmp_path / name).mkdir()
        picture("red", 0).save(tmp_path / name / "a.JPG", "JPEG")
    data = open_labelled(tmp_path)
    assert data.names == ["blue circle", "red square"]
    assert [sample.label for sample in data] == [0, 1]
    with pytest.raises(EvaluationError, match="3 class names for 2 folders"):
        open_labelled(tmp_path, ["a", "b", "c"])
    (tmp_path / "red_square" / "b.png").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"b\.png"):
        list(encoder.images(open_labelled(tmp_path)))


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    for name in ("test", "exam"):
        (tmp_path / name).mkdir()
        picture("red", 0).save(tmp_path / name / "a.png")
    assert open_labelled(tmp_path).names == ["exam", "test"]


def test_pictures_come_from_shards_folders_or_a_file(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "run" / "shards", samples(5), per_shard=2)
    assert len(Shards(shards)) == 5
    found, count = read_pictures(str(tmp_path / "run"))
    assert count == 5
    assert [sample.captions for sample in found][:2] == [("a red picture",), ("a green picture",)]
    write_folders(tmp_path / "deep" / "er", 2)
    found, count = read_pictures(str(tmp_path / "deep"))
    assert count == len(list(found)) == 8
    assert read_pictures(str(next((tmp_path / "deep" / "er" / "red").iterdir())))[1] == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="expected shards, a picture or a folder"):
        read_pictures(str(tmp_path / "empty"))
    with pytest.raises(ShardsError, match="nowhere"):
        read_pictures(str(tmp_path / "nowhere"))


def test_a_picture_that_cannot_be_read_stops_an_evaluation_or_is_handed_over(encoder: Encoder) -> None:
    good = [Sample(f"good {i}", jpeg(picture("red", i))) for i in range(9)]
    mixed = [*good[:4], Sample("bad", b"<html>"), *good[4:]]
    with pytest.raises(EvaluationError, match=r"^bad: "):
        list(encoder.images(mixed))
    named: list[str] = []
    batches = list(encoder.images(mixed, corrupt=lambda sample, why: named.append(sample.where)))
    assert named == ["bad"]
    assert [sample.where for batch, _ in batches for sample in batch] == [sample.where for sample in good]
    whole = torch.cat([vectors for _, vectors in batches])
    assert torch.allclose(whole, torch.cat([vectors for _, vectors in encoder.images(good)]), atol=1e-5)


def test_the_result_is_clip_benchmarks(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folders(tmp_path / "colours", 1)
    assert main(["zeroshot", "--model", model, "--data", str(data)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {key: result[key] for key in ("dataset", "model", "pretrained", "task", "language")} == {
        "dataset": "colours",
        "model": model,
        "pretrained": "",
        "task": "zeroshot_classification",
        "language": "en",
    }
    assert set(result["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}


def test_a_wrong_command_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(tmp_path / "data", 1)
    assert main(["zeroshot", "--model", "ViT-B-23", "--data", str(tmp_path / "data")]) == 2
    assert "ViT-B-32" in capsys.readouterr().err
