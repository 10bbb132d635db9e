"""Prepare: every row ends in a shard or the quarantine, and the shards do not depend on who wrote them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines.prepare
import pipelines.survey
from pipelines.config import DataConfig
from pipelines.prepare import prepare
from pipelines.prepared import Prepared, image_array, read_manifest
from pipelines.scenes import DESIGNS, make_scenes
from pipelines.schemas import PREPARED, QUARANTINE, check_schema
from pipelines.shard_file import pack_shard, read_shard
from pipelines.sources.open_source import open_source
from pipelines.storage import AlreadyExistsError

# Ray itself sets options it has deprecated whenever a data context is made.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

SCENES = DataConfig(num_train=50, num_selection=8, num_test=12, rows_per_shard=20)


def png(colour=(10, 20, 30), size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def save_pairs(path: Path, rows: list[dict], **options) -> DataConfig:
    """A Parquet file with good rows, each overlaid with what a test gives, and the config that reads it."""
    names = ["id", "image", "captions", "split"]
    good = [
        {"id": f"row{i}", "image": png(), "captions": [f"text {i}"], "split": "train"}
        for i in range(len(rows))
    ]
    merged = [{**before, **row} for before, row in zip(good, rows, strict=True)]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.binary()),
            ("captions", pa.list_(pa.string())),
            ("split", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(merged, schema=schema).select(names), path, row_group_size=4)
    columns = dict.fromkeys(["caption", "labels", "class_name", "group", "source", "boxes"])
    return DataConfig(source=f"parquet:{path}", columns=columns, **{"image_size": 8, **options})


@pytest.fixture
def one_by_one(monkeypatch):
    """The stage without Ray: pieces one after the other, last piece first."""

    def results(pieces, task):
        for piece in reversed(pieces):
            yield task(piece)

    for module in (pipelines.prepare, pipelines.survey):
        monkeypatch.setattr(module, "map_pieces", results)


@pytest.fixture(scope="module")
def scenes(ray_session, tmp_path_factory) -> Prepared:
    uri = str(tmp_path_factory.mktemp("scenes") / "prepared")
    prepare(SCENES, uri)
    return Prepared.open(uri)


@pytest.mark.ray
def test_manifest_describes_what_is_there(scenes):
    manifest = scenes.manifest
    assert {split: found["rows"] for split, found in manifest["splits"].items()} == {
        "train": 50,
        "selection": 8,
        "test": 12,
    }
    assert [shard["rows"] for shard in manifest["splits"]["train"]["shards"]] == [20, 20, 10]
    assert manifest["num_rows_in"] == 70
    assert manifest["quarantine"] == {}
    assert manifest["sources"] == ["scenes-quick"]
    assert manifest["source_identity"] == open_source(SCENES).identity
    assert DataConfig(**manifest["config"]) == SCENES
    labels = [label for row in scenes.table("test")["labels"].to_pylist() for label in row]
    assert manifest["label_counts"]["test"] == {label: labels.count(label) for label in sorted(set(labels))}
    assert manifest["vocab_size"] == scenes.tokenizer().vocab_size


@pytest.mark.ray
@pytest.mark.parametrize("split", ["train", "selection", "test"])
def test_prepared_scenes_are_the_scenes(scenes, split):
    table = scenes.table(split)
    check_schema(table.schema, PREPARED, where=split)
    made = make_scenes(DESIGNS["quick"], split=split, indices=range(len(table)), seed=0)
    same = ["row_id", "captions", "sentences", "labels", "class_name", "source", "split", "boxes"]
    assert table.select(same).to_pylist() == made.select(same).to_pylist()
    images = scenes.images(split)
    assert images.shape == (len(table), 32, 32, 3)
    for pixels, data in zip(images, made["image"].to_pylist(), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert (images[0] != images[1]).any()


@pytest.mark.ray
def test_tokens_are_those_of_the_texts(scenes):
    tokenizer = scenes.tokenizer()
    longest = 0
    for row in scenes.table("train").to_pylist():
        assert row["caption_tokens"] == tokenizer.encode(row["captions"])
        assert row["sentence_tokens"] == tokenizer.encode(row["sentences"])
        longest = max(longest, *map(len, row["caption_tokens"] + row["sentence_tokens"]))
    test = scenes.table("test").to_pylist()
    longest = max(longest, *(len(tokens) for row in test for tokens in row["caption_tokens"]))
    assert longest <= scenes.manifest["max_caption_tokens"] <= longest + 2


@pytest.mark.ray
def test_bytes_do_not_depend_on_workers_or_order(scenes, one_by_one, tmp_path):
    manifest = prepare(SCENES, str(tmp_path / "again"))
    assert manifest == scenes.manifest
    for file in ["tokenizer.json", "shards/train-00001.arrow", "quarantine.parquet"]:
        assert (tmp_path / "again" / file).read_bytes() == Path(scenes.uri, file).read_bytes()
    other = prepare(SCENES.model_copy(update={"seed": 1}), str(tmp_path / "other"))
    assert other["data_sha"] != manifest["data_sha"]


@pytest.mark.ray
def test_existing_data_is_never_overwritten(scenes):
    with pytest.raises(AlreadyExistsError, match=r"manifest\.json' exists already"):
        prepare(SCENES, scenes.uri)


def test_a_half_written_location_is_done_again(one_by_one, tmp_path):
    config = save_pairs(tmp_path / "pairs.parquet", [{}] * 9, rows_per_shard=4)
    uri = str(tmp_path / "prepared")
    first = prepare(config, uri)
    (tmp_path / "prepared" / "manifest.json").unlink()
    (tmp_path / "prepared" / "shards" / "train-00001.arrow").write_bytes(b"half")
    assert read_manifest(uri) is None
    with pytest.raises(ValueError, match="no prepared data at"):
        Prepared.open(uri)
    assert prepare(config, uri) == first
    assert Prepared.open(uri).table("train")["row_id"].to_pylist() == [f"row{i}" for i in range(9)]


BAD_ROWS = {
    "undecodable_image": [{"image": b"no image"}, {"image": png(size=(300, 300))[:200]}],
    "missing_image": [{"image": None}],
    "empty_caption": [{"captions": [" ", ""]}, {"captions": None}],
    "unknown_split": [{"split": None}],
    "missing_row_id": [{"id": None}, {"id": None}],
    "duplicate_row_id": [{"id": "row0"}, {"id": "row1"}, {"id": "row0"}],
}


@pytest.mark.ray
def test_every_row_is_in_a_shard_or_in_quarantine(ray_session, tmp_path):
    bad = [row for rows in BAD_ROWS.values() for row in rows]
    config = save_pairs(
        tmp_path / "p.parquet", [{}, {}, *bad, {}, {}], max_quarantined_share=0.8, rows_per_shard=4
    )
    manifest = prepare(config, str(tmp_path / "out"))
    assert manifest["quarantine"] == {reason: len(rows) for reason, rows in sorted(BAD_ROWS.items())}
    assert manifest["num_rows_in"] == 4 + len(bad)
    prepared = Prepared.open(str(tmp_path / "out"))
    kept = prepared.table("train")["row_id"].to_pylist()
    assert kept == ["row0", "row1", f"row{len(bad) + 2}", f"row{len(bad) + 3}"]
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet")
    check_schema(quarantine.schema, QUARANTINE, where="quarantine")
    assert len(quarantine) + len(kept) == manifest["num_rows_in"]
    assert quarantine["reason"].to_pylist() == [reason for reason, rows in BAD_ROWS.items() for _ in rows]
    assert quarantine["message"][0].as_py() == "not in an image format Pillow knows"
    assert "truncated" in quarantine["message"][1].as_py()


def test_too_many_bad_rows_stop_with_their_reasons(one_by_one, tmp_path):
    rows = [{}, {}, {}, {"image": b"x"}, {"captions": [""]}]
    config = save_pairs(tmp_path / "pairs.parquet", rows, max_quarantined_share=0.3)
    with pytest.raises(
        ValueError, match=r"2 of 5 rows are unusable \(empty_caption 1, undecodable_image 1\)"
    ):
        prepare(config, str(tmp_path / "out"))
    assert len(pq.read_table(tmp_path / "out" / "quarantine.parquet")) == 2
    assert read_manifest(str(tmp_path / "out")) is None
    enough = config.model_copy(update={"max_quarantined_share": 0.4})
    assert prepare(enough, str(tmp_path / "out"))["splits"]["train"]["rows"] == 3


@pytest.mark.parametrize(
    ("rows", "found"),
    [([{"split": "test"}] * 3, 0), ([{}, {"split": "test"}], 1), ([{}, {"image": b"x"}], 1)],
)
def test_fewer_than_two_training_rows_are_refused(one_by_one, tmp_path, rows, found):
    config = save_pairs(tmp_path / "pairs.parquet", rows, max_quarantined_share=1.0)
    with pytest.raises(ValueError, match=f"at least 2 usable rows in the train split, found {found}"):
        prepare(config, str(tmp_path / "out"))


def test_settings_are_checked_before_any_work(one_by_one, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="vocab_size must be >= 259"):
        prepare(SCENES.model_copy(update={"vocab_size": 100}), out)
    with pytest.raises(ValueError, match=r"tokenizer\.json' does not exist"):
        prepare(SCENES.model_copy(update={"tokenizer": str(tmp_path)}), out)
    with pytest.raises(ValueError, match="does not exist"):
        prepare(DataConfig(source=f"parquet:{tmp_path}/none.parquet"), out)
    assert not Path(out).exists()


def test_a_given_tokenizer_is_used_and_kept(scenes, one_by_one, tmp_path):
    config = save_pairs(
        tmp_path / "pairs.parquet", [{}] * 3, tokenizer=f"{scenes.uri}/tokenizer.json", max_tokens=9
    )
    prepare(config, str(tmp_path / "out"))
    prepared = Prepared.open(str(tmp_path / "out"))
    assert prepared.tokenizer().encode(["an eight"]) == scenes.tokenizer().encode(["an eight"])
    assert prepared.tokenizer().max_tokens == 9


def test_shards_are_cut_at_their_size_within_one_large_row_group(one_by_one, tmp_path):
    config = save_pairs(tmp_path / "pairs.parquet", [{}] * 11, rows_per_shard=3)  # row groups of 4, 4, 3
    manifest = prepare(config, str(tmp_path / "out"))
    names = [shard["path"] for shard in manifest["splits"]["train"]["shards"]]
    assert [shard["rows"] for shard in manifest["splits"]["train"]["shards"]] == [3, 1, 3, 1, 3]
    assert names == [f"shards/train-{number:05d}.arrow" for number in range(5)]
    order = Prepared.open(str(tmp_path / "out")).table("train")["row_id"].to_pylist()
    assert order == [f"row{i}" for i in range(11)]


def test_progress_counts_rows_of_both_passes(one_by_one, tmp_path):
    calls: list[tuple[str, int, int]] = []
    config = save_pairs(tmp_path / "pairs.parquet", [{}] * 8, rows_per_shard=4)
    prepare(config, str(tmp_path / "out"), on_progress=lambda *call: calls.append(call))
    assert calls == [
        ("reading texts", 4, 8),
        ("reading texts", 8, 8),
        ("writing shards", 4, 8),
        ("writing shards", 8, 8),
    ]


@pytest.mark.ray
def test_a_worker_that_dies_loses_no_row(ray_session, tmp_path, monkeypatch):
    config = save_pairs(tmp_path / "pairs.parquet", [{}] * 12, rows_per_shard=4)
    calm = open_source(config)
    marker = str(tmp_path / "died")

    class DiesOnce:
        identity = calm.identity
        pieces = calm.pieces

        def read(self, piece, *, with_images=True):
            import os

            for table in calm.read(piece, with_images=with_images):
                if with_images and piece.number == 1 and not os.path.exists(marker):
                    os.mkdir(marker)
                    os._exit(1)
                yield table

    monkeypatch.setattr(pipelines.prepare, "open_source", lambda _: DiesOnce())
    manifest = prepare(config, str(tmp_path / "out"))
    assert Path(marker).exists()
    order = Prepared.open(str(tmp_path / "out")).table("train")["row_id"].to_pylist()
    assert order == [f"row{i}" for i in range(12)]
    assert manifest["num_rows_in"] == 12


def test_a_source_that_changes_between_the_passes_is_refused(one_by_one, tmp_path, monkeypatch):
    config = save_pairs(tmp_path / "pairs.parquet", [{}] * 4)
    source = open_source(config)

    class Shrinks:
        identity = source.identity
        pieces = source.pieces

        def read(self, piece, *, with_images=True):
            for table in source.read(piece, with_images=with_images):
                yield table.slice(1) if with_images else table

    monkeypatch.setattr(pipelines.prepare, "open_source", lambda _: Shrinks())
    with pytest.raises(ValueError, match="the source changed while it was read: 4 rows, then 3"):
        prepare(config, str(tmp_path / "out"))


def test_reader_refuses_what_the_manifest_does_not_describe(one_by_one, tmp_path):
    uri = tmp_path / "out"
    prepare(save_pairs(tmp_path / "pairs.parquet", [{}] * 4), str(uri))
    with pytest.raises(ValueError, match="split must be one of"):
        Prepared.open(str(uri)).table("dev")
    shard = uri / "shards" / "train-00000.arrow"
    rest = pack_shard(read_shard(str(shard)).slice(1))
    shard.unlink()
    shard.write_bytes(rest)
    with pytest.raises(ValueError, match="the manifest says 4 rows, found 3"):
        Prepared.open(str(uri)).table("train")
    manifest = json.loads((uri / "manifest.json").read_text())
    (uri / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version must be 2, found 99"):
        Prepared.open(str(uri))


def test_later_copies_of_an_id_are_found_across_pieces():
    pieces = [["a", "b", "a"], [], ["c", "b"], ["d"], ["d", "a", "e"]]
    arrays = [pa.array(ids, pa.large_string()) for ids in pieces]
    seen, expected = set(), {}
    for number, ids in enumerate(pieces):
        for position, row_id in enumerate(ids):
            if row_id in seen:
                expected.setdefault(number, []).append(position)
            seen.add(row_id)
    assert pipelines.survey.find_duplicates(arrays) == expected == {0: [2], 2: [1], 4: [0, 1]}
    assert pipelines.survey.find_duplicates([pa.array(["a", "b"], pa.large_string())]) == {}


def test_image_array_is_a_view_of_one_chunk_and_joins_several():
    data = [bytes([i] * 12) for i in range(5)]
    whole = image_array(pa.chunked_array([pa.array(data, pa.binary()).slice(1)]), size=2)
    assert whole.shape == (4, 2, 2, 3)
    assert whole[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert not whole.flags.owndata
    joined = image_array(pa.chunked_array([data[:2], data[2:]], pa.binary()), size=2)
    assert joined[:, 1, 1, 2].tolist() == [0, 1, 2, 3, 4]
    assert image_array(pa.chunked_array([], pa.binary()), size=2).shape == (0, 2, 2, 3)
    with pytest.raises(ValueError, match="2 x 2 x 3 = 12 bytes"):
        image_array(pa.chunked_array([[b"short"]], pa.binary()), size=2)


@pytest.mark.ray
@pytest.mark.shared_data
def test_photographs_with_several_captions_and_boxes(ray_session, shared_data, tmp_path):
    config = DataConfig(source=f"parquet:{shared_data}/coco_photos_mini.parquet", image_size=48)
    manifest = prepare(config, str(tmp_path / "out"))
    assert manifest["num_rows_in"] == 83
    assert manifest["quarantine"] == {}
    prepared = Prepared.open(str(tmp_path / "out"))
    assert prepared.images("train").shape == (56, 48, 48, 3)
    boxes = [box for row in prepared.table("test")["boxes"].to_pylist() for box in row or []]
    assert boxes
    assert all(b["x"] >= 0 and b["x"] + b["w"] <= 1.0001 and b["w"] > 0 for b in boxes)
    assert prepared.num_rows("selection") == 0
    assert prepared.images("selection").shape == (0, 48, 48, 3)
