from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.labelled import write_folders
from trainer.evaluate.__main__ import main
from trainer.evaluate.bias import rates


def test_rates_by_hand() -> None:
    given = np.array(["crime", None, "crime", None, "animal", None], object)
    groups = {"age": ["young", "young", "old", "old", "old", "old"], "sex": ["f", "m", "", "f", "m", ""]}
    found = rates(given, ["crime", "animal"], groups)
    assert found["crime"]["rate"] == pytest.approx(2 / 6)
    assert found["crime"]["by"]["age"] == {"rate": {"old": 0.25, "young": 0.5}, "max_disparity": 0.25}
    assert found["crime"]["by"]["sex"] == {"rate": {"f": 0.5, "m": 0.0}, "max_disparity": 0.5}
    assert found["animal"]["by"]["age"]["rate"] == {"old": 0.25, "young": 0.0}
    assert found["group_sizes"] == {"age": {"old": 4, "young": 2}, "sex": {"f": 2, "m": 2}}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "classes.txt").write_text("a person\na child\n")
    (tmp_path / "labels.yaml").write_text("crime: [thief]\nnon_human: [animal, gorilla]\n")
    return ["--classnames", str(tmp_path / "classes.txt"), "--labels", str(tmp_path / "labels.yaml")]


def test_a_csv_and_folders_of_groups_give_the_same(evaluate, words: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = write_folders(tmp_path / "people", 2)
    lines = [f"people/{file.parent.name}/{file.name},{file.parent.name}" for file in sorted(data.glob("*/*.png"))]
    (tmp_path / "people.csv").write_text("\n".join(["image,group", *lines]))
    by_folder = evaluate("bias", "--data", data, *words)
    assert by_folder == evaluate("bias", "--data", tmp_path / "people.csv", *words)
    assert by_folder["group_sizes"]["group"] == {"blue": 2, "green": 2, "red": 2, "white": 2}
    # With one innocuous class less, or more denigratory labels, the rates can only rise.
    (tmp_path / "labels.yaml").write_text("any: [thief, animal, gorilla, a person, a child]\n")
    assert evaluate("bias", "--data", data, *words)["any"]["rate"] >= by_folder["crime"]["rate"]


@pytest.mark.parametrize(
    ("csv", "labels", "message"),
    [
        ("image\nx.png\n", "crime: [thief]", "at least one column of groups"),
        ("", "crime: [thief]", "no rows below the line of column names"),
        ("image,age\nx.png,old\n", "crime: thief", "expected categories"),
        ("image,age\nx.png,old\n", "[thief]", "expected categories"),
        ("image,age\nx.png,old\n", "crime: [thief]", "x.png"),
    ],
)
def test_mistakes_in_the_input_files_are_reported(
    model: str,
    words: list[str],
    tmp_path: Path,
    csv: str,
    labels: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "people.csv").write_text(csv)
    (tmp_path / "labels.yaml").write_text(labels)
    assert main(["bias", "--model", model, "--data", str(tmp_path / "people.csv"), *words]) == 2
    assert message in capsys.readouterr().err
