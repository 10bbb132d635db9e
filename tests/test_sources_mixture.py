"""Mixtures of sources: one set of rows, each of which keeps its source, and a weight per source."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import pipelines.prepare
import pipelines.survey
from pipelines.config import ColumnMap, MixturePart
from pipelines.config_tree import load_config
from pipelines.feed import train_order
from pipelines.prepare import prepare
from pipelines.prepared import Prepared
from pipelines.sources.mixture import _Overlay, source_weights
from pipelines.sources.open_source import open_source, source_identity
from pipelines.sources.source_spec import source_stem
from tests.source_fixtures import data_config, picture, problems_of, rows_of, samples, write_tar


@pytest.fixture
def places(tmp_path):
    """A tar, an image folder with splits, and a CSV file, in which ids and groups are alike."""
    write_tar(tmp_path / "tars" / "0.tar", samples(range(3)))
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        (tmp_path / "photos" / split / "cat" / "0.png").write_bytes(picture())
    (tmp_path / "0.png").write_bytes(picture(5))
    (tmp_path / "pairs.csv").write_text(
        "image,caption,source,id,group\n0.png,x,lab,000000000,g\n0.png,y,,,\n"
    )
    return tmp_path


def parts_of(places: Path) -> list[MixturePart]:
    return [
        MixturePart(source=f"webdataset:{places}/tars", weight=0.5),
        MixturePart(source=f"folder:{places}/photos", name="pets", caption_template="the {}"),
        MixturePart(source=f"csv:{places}/pairs.csv", split="test"),
    ]


def test_rows_keep_their_source_and_ids_cannot_collide(places):
    config = data_config("mixture", mixture=parts_of(places), rows_per_shard=2)
    rows = rows_of(config)
    assert [(row["row_id"], row["source"]) for row in rows if not row["row_id"].startswith("pets")] == [
        ("tars/000000000", "tars"),
        ("tars/000000001", "tars"),
        ("tars/000000002", "tars"),
        ("pairs/000000000", "pairs/lab"),
        ("", "pairs"),
    ]
    pets = {row["row_id"]: row for row in rows if row["row_id"].startswith("pets")}
    assert {row_id: (row["split"], row["source"]) for row_id, row in pets.items()} == {
        "pets/train/cat/0.png": ("train", "pets"),
        "pets/test/cat/0.png": ("test", "pets"),
    }
    assert pets["pets/train/cat/0.png"]["captions"] == ["the cat"]
    assert [row["group_id"] for row in rows[-2:]] == ["pairs/g", None]
    assert [row["split"] for row in rows[-2:]] == ["test", "test"]
    assert rows[0]["group_id"] is None
    assert [piece.num_rows for piece in open_source(config).pieces()][-2:] == [2, 2]
    assert [piece.number for piece in open_source(config).pieces()] == [0, 1, 2]


def test_a_part_alone_yields_the_same_rows(places):
    alone = rows_of(data_config(f"webdataset:{places}/tars"))
    mixed = rows_of(data_config("mixture", mixture=parts_of(places)))[: len(alone)]
    assert [row["row_id"] for row in mixed] == [f"tars/{row['row_id']}" for row in alone]
    same = ("image", "captions", "split", "labels", "class_name", "boxes")
    assert [[row[key] for key in same] for row in mixed] == [[row[key] for key in same] for row in alone]


def test_weights_are_of_every_source_that_rows_name(places):
    source = open_source(data_config("mixture", mixture=parts_of(places)))
    assert source.weights == {"tars": 0.5, "pets": 1.0, "pairs": 1.0}
    named = source_weights(source, ["pairs", "pairs/lab", "tars"])
    assert named == {"pairs": 1.0, "pairs/lab": 1.0, "tars": 0.5}
    assert source_weights(open_source(data_config(f"folder:{places}/photos")), ["photos"]) == {}


def test_the_manifest_carries_the_weights(places, tmp_path, monkeypatch):
    def one_by_one(pieces, task):
        return [task(piece) for piece in pieces]

    for module in (pipelines.prepare, pipelines.survey):
        monkeypatch.setattr(module, "map_pieces", one_by_one)
    config = data_config(
        "mixture", mixture=parts_of(places), image_size=8, split="train", max_quarantined_share=0.5
    )
    manifest = prepare(config, str(tmp_path / "out"))
    assert manifest["source_weights"] == {"pairs/lab": 1.0, "pets": 1.0, "tars": 0.5}
    shards = manifest["splits"]["train"]["shards"]
    assert [(shard["rows"], shard["weight"]) for shard in shards] == [(3, 0.5), (2, 1.0)]
    order = train_order(Prepared.open(str(tmp_path / "out")), batch_size=2, seed=0)
    assert order.shard_weights == (0.5, 1.0)
    assert manifest["quarantine"] == {"missing_row_id": 1}


def test_parts_take_from_the_whole_what_they_do_not_say(places):
    parts = [
        MixturePart(source=f"csv:{places}/pairs.csv", columns=ColumnMap(group="caption")),
        *parts_of(places)[2:],
    ]
    rows = rows_of(data_config("mixture", mixture=parts, split="train", columns={"source": None}))
    assert [row["group_id"] for row in rows] == ["pairs/x", "pairs/y", "pairs-2/g", None]
    assert [row["split"] for row in rows] == ["train", "train", "test", "test"]
    # Columns are given as a whole: the first part has its own, the second those of the mixture.
    assert [row["source"] for row in rows] == ["pairs/lab", "pairs", "pairs-2", "pairs-2"]


def test_a_file_lists_the_parts_relative_to_itself(places):
    listed = [
        {"source": "webdataset:tars::tars", "weight": 3},
        {"source": "csv:pairs.csv", "image_root": ".", "columns": {"source": None}},
    ]
    (places / "mix.yaml").write_text(yaml.safe_dump({"mixture": listed}))
    config = data_config(f"mixture:{places}/mix.yaml", columns={"split": None})
    rows = rows_of(config)
    assert [row["source"] for row in rows] == ["tars"] * 6 + ["pairs"] * 2
    assert open_source(config).weights == {"tars": 3.0, "pairs": 1.0}
    assert rows_of(data_config(f"mixture:file://{places}/mix.yaml", columns={"split": None})) == rows
    before = source_identity(config)
    listed[0]["weight"] = 2
    (places / "mix.yaml").write_text(yaml.safe_dump(listed))
    changed = source_identity(config)
    listed[1]["columns"] = {}
    (places / "mix.yaml").write_text(yaml.safe_dump(listed))
    assert len({before, changed, source_identity(config)}) == 3


def test_a_part_may_be_radiographs_with_settings_of_its_own(tmp_path):
    part = MixturePart(source="chexpert:/x", views="frontal", reports="labels")
    settings = _Overlay.of(data_config("mixture", views="all", sections="findings"), part)
    assert (settings.views, settings.reports, settings.sections) == ("frontal", "labels", "findings")
    assert (settings.source, list(settings.mixture)) == ("chexpert:/x", [])


def test_problems_pass_through(places):
    path = places / "tars" / "0.tar"
    path.write_bytes(path.read_bytes()[:9000])
    rows = rows_of(data_config("mixture", mixture=parts_of(places)[:1]))
    assert problems_of(rows) == {"tars/0@8704": "truncated_shard"}


def test_notes_name_their_part(places):
    notes = open_source(data_config("mixture", mixture=parts_of(places))).notes
    assert any(note.startswith("tars: rows that name no split") for note in notes)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"data.source=mixture needs parts: data.mixture=\[\{source"),
        ([{"source": "mixture:x"}], "part 'x' is a mixture itself"),
        ([{"source": "csv:/none.csv", "name": "a"}], "part 'a': data.source: '/none.csv' does not exist"),
        ([{"source": "cvs:/none.csv"}], "part 'none': .*did you mean 'csv:'"),
        (
            [{"source": "scenes:quick", "name": "a"}, {"source": "scenes:tokens", "name": "a"}],
            "two parts are called 'a'",
        ),
    ],
)
def test_unusable_mixtures_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        open_source(data_config("mixture", mixture=[MixturePart(**part) for part in parts]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {source: [", "is not valid YAML"),
        ("mixture: {}", "must list parts of a mixture: list: Input should be a valid list"),
        ("- {source: x, weight: 0}", r"0.weight: Input should be greater than 0"),
        ("- {source: x, wieght: 1}", r"0.wieght: Extra inputs are not permitted"),
        ("- {weight: 1}", r"0.source: Field required"),
        ("[]", "needs parts"),
    ],
)
def test_unusable_files_are_refused(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(data_config(f"mixture:{tmp_path}/mix.yaml"))


def test_one_place_lists_the_parts(places):
    with pytest.raises(ValueError, match=r"mix.yaml' does not exist"):
        open_source(data_config(f"mixture:{places}/mix.yaml"))
    with pytest.raises(ValueError, match="both list parts"):
        open_source(data_config(f"mixture:{places}/mix.yaml", mixture=parts_of(places)))


def test_the_command_line_makes_places_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(
        overrides=[
            "data.source=webdataset:a/{0..1}.tar::b",
            "data.image_root=images",
            "data.mixture=[{source: csv:x.csv, image_root: y, weight: 2}, {source: scenes:quick}]",
        ]
    )
    assert config.data.source == f"webdataset:{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b"
    assert config.data.image_root == f"{tmp_path}/images"
    first, second = config.data.mixture
    assert (first.source, first.image_root, first.weight) == (f"csv:{tmp_path}/x.csv", f"{tmp_path}/y", 2)
    assert second.source == "scenes:quick"
    assert load_config(overrides=["data.source=mixture"]).data.source == "mixture"
    with pytest.raises(ValueError, match=r"data\.mixture: Input should be a valid list"):
        load_config(overrides=["data.mixture=3"])


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("scenes:quick", "scenes-quick"),
        ("parquet:s3://bucket/set/pairs.v2.parquet?scheme=http", "pairs.v2"),
        ("webdataset:/data/cc3m/{00000..00331}.tar::/data/x", "cc3m"),
        ("csv:/data/a b.tsv.gz", "a-b"),
        ("mixture", "mixture"),
        ("hf:/data/saved/", "saved"),
    ],
)
def test_short_names(source, stem):
    assert source_stem(source) == stem
