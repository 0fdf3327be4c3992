"""DataComp's subsets from CommonPool's metadata, without downloads or models, compared with independent code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import verify
from tests.conftest import Command

ENGLISH = "a photograph of two people who walk along the beach in the evening"
OTHERS = [
    "ein Foto von zwei Menschen, die abends am Strand spazieren gehen",
    "deux personnes marchent le soir sur la plage",
]
SHORT = ["nice dog", "a b c", "hat"]
RECIPE = """
name: {name}
pool: {{path: metadata, caption: text, uid: uid, embeddings: {{l14_img: "{{stem}}.npz#l14_img"}}}}
run: {name}
unit_rows: 300
steps:
{steps}
  - write_subset: {{rows_per_part: 100}}
"""
RECIPES = {
    "basic": """
  - caption_length: {min_chars: 6, min_words: 3}
  - language: {keep: [en]}
  - image_size: {min_side: 200, columns: [pool_original_width, pool_original_height]}
  - aspect_ratio: {max: 3.0, columns: [pool_original_width, pool_original_height]}
""",
    "clip_score": "  - threshold: {column: clip_l14_similarity_score, top_fraction: 0.3}\n",
    "near_targets": """
  - norm_sim: {target: FOLDER/targets.npy, vector: l14_img}
  - threshold: {column: norm_sim_score, top_fraction: 0.2}
""",
}


@pytest.fixture
def metadata(tmp_path: Path) -> tuple[pa.Table, np.ndarray]:
    """Writes a small pool in two files in DataComp's format, and returns its rows and image embeddings."""
    (tmp_path / "metadata").mkdir()
    rng = np.random.default_rng(0)
    tables, embeddings = [], []
    for name, rows in (("00", 700), ("01", 300)):
        texts = [ENGLISH, *OTHERS, *SHORT]
        table = pa.table(
            {
                "uid": [rng.bytes(16).hex() for _ in range(rows)],
                "url": [f"http://host{i % 90}.example/{name}/{i}.jpg" for i in range(rows)],
                "text": [texts[k] for k in rng.choice(6, rows, p=[0.7, 0.1, 0.1, 0.04, 0.03, 0.03])],
                "original_width": rng.integers(100, 1500, rows),
                "original_height": rng.integers(100, 1500, rows),
                "clip_b32_similarity_score": rng.normal(0.2, 0.05, rows).astype(np.float32),
                "clip_l14_similarity_score": rng.normal(0.2, 0.05, rows).astype(np.float32),
                "face_bboxes": [[[0.1, 0.1, 0.2, 0.2]]] * rows,
                "sha256": [rng.bytes(32).hex() for _ in range(rows)],
            }
        )
        arrays = {
            name: rng.normal(size=(rows, 16)).astype(np.float16)
            for name in ("b32_img", "b32_txt", "l14_img", "l14_txt")
        }
        pq.write_table(table, tmp_path / f"metadata/{name}.parquet", row_group_size=256)
        np.savez(tmp_path / f"metadata/{name}.npz", **arrays)
        tables.append(table)
        embeddings.append(arrays["l14_img"].astype(np.float32))
    np.save(tmp_path / "targets.npy", rng.normal(size=(5, 16)).astype(np.float32))
    return pa.concat_tables(tables), np.concatenate(embeddings)


def expected(name: str, rows: pa.Table, vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rows that DataComp's rules keep (Gadre et al. 2023, appendix), and the rows nearest to the targets."""
    if name == "basic":
        width, height = (rows[f"original_{side}"].to_numpy() for side in ("width", "height"))
        words = np.array([len(text.split()) > 2 and len(text) > 5 for text in rows["text"].to_pylist()])
        english = np.array([text not in OTHERS for text in rows["text"].to_pylist()])
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        return words & english & (shorter >= 200) & (longer / shorter <= 3)
    if name == "clip_score":
        scores, share = rows["clip_l14_similarity_score"].to_numpy(), 0.3
    else:
        units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, targets)]
        scores, share = np.abs(units[0] @ units[1].T).max(axis=1), 0.2
    return scores >= np.sort(scores)[-math.ceil(len(scores) * share)]


@pytest.mark.parametrize("name", ["combined", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES)])
def test_a_subset_follows_the_rules_of_datacomp(
    run: Command, tmp_path: Path, metadata: tuple[pa.Table, np.ndarray], name: str
) -> None:
    rows, vectors = metadata
    steps = "".join(RECIPES.values()) if name == "combined" else RECIPES[name]
    (tmp_path / "r.yaml").write_text(RECIPE.format(name=name, steps=steps.replace("FOLDER", str(tmp_path))))
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / name / "subset/subset.npy")
    keep = np.ones(len(rows), bool)
    for rule in RECIPES if name == "combined" else [name]:
        keep[keep] = expected(rule, rows.filter(pa.array(keep)), vectors[keep], np.load(tmp_path / "targets.npy"))
    uids = rows["uid"].filter(pa.array(keep)).to_pylist()
    pairs = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], np.dtype("u8,u8"))
    assert 10 < len(pairs) < 700
    assert found.dtype == pairs.dtype
    assert np.array_equal(found, np.sort(pairs))
    assert verify.main([str(tmp_path / name), "--deep"]) == 0
