"""How a trained model is read: all patches, kept patches, or binary codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.hashing import binary_codes, hamming_distances
from models.methods.catalogue import METHODS
from pipelines.encode import ModelEncoder
from pipelines.evaluate import evaluate_trained, readouts
from pipelines.prepared import Prepared
from pipelines.pretrain import build_trainer
from tests.pipeline_fixture import small_config, small_job

TEXTS = ["a picture of a three", "the digit five", "no digit", "a seven and a two"]


@pytest.fixture(scope="module")
def prepared(small_prepared: str) -> Prepared:
    return Prepared.open(small_prepared)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def encoder_of(method: str, prepared: Prepared, folder, readout) -> ModelEncoder:
    trainer = build_trainer(small_config(folder, f"method={method}"), prepared)
    return ModelEncoder(trainer.model, prepared.tokenizer(), teacher=trainer.teacher, readout=readout)


@pytest.mark.ray
def test_cosines_of_codes_rank_as_hamming_distances(prepared, images, tmp_path):
    encoder = encoder_of("cmimh", prepared, tmp_path, "codes")
    image_codes, text_codes = encoder.encode_images(images).image_embeds, encoder.encode_texts(TEXTS)
    num_bits = METHODS["cmimh"].heads.hash.num_bits
    assert image_codes.shape == (6, num_bits)
    np.testing.assert_allclose(np.abs(image_codes), num_bits**-0.5)
    bits = [binary_codes(torch.from_numpy(codes)) for codes in (image_codes, text_codes)]
    distances = hamming_distances(*bits).numpy()
    np.testing.assert_allclose(image_codes @ text_codes.T, 1 - 2 * distances / num_bits, atol=1e-6)
    plain = encoder_of("cmimh", prepared, tmp_path, "all").encode_images(images).image_embeds
    assert plain.shape != image_codes.shape


@pytest.mark.ray
def test_a_method_without_the_head_has_no_codes(prepared, images, tmp_path):
    with pytest.raises(ValueError, match=r"heads\.hash\.weight > 0"):
        encoder_of("clip", prepared, tmp_path, "codes").encode_images(images)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("clip", ["all"]), ("aclip", ["all", "kept"]), ("flip", ["all", "kept"]), ("cmimh", ["all", "codes"])],
)
def test_methods_are_read_in_the_ways_they_have(method, expected, tmp_path):
    assert readouts(small_config(tmp_path, f"method={method}")) == expected


@pytest.mark.ray
def test_codes_are_scored_beside_the_embeddings(prepared, tmp_path):
    config = small_config(tmp_path, "method=cmimh", "evaluation.resamples=0")
    trainer = build_trainer(config, prepared)
    found = evaluate_trained(
        small_job(config, prepared.uri, "codes"), config, prepared, trainer, split="test"
    )
    rules = {(record["task"], record["clipfleet"]["keep_rule"]) for record in found}
    assert ("zeroshot_retrieval", "codes") in rules
    assert ("zeroshot_retrieval", "all") in rules
    # Which patch a bit comes from is not known.
    assert ("pointing_game", "codes") not in rules
