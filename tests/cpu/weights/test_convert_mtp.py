"""MTP layers for a checkpoint that has none: everything else is copied bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_support import change_config, converted

from miles.arch import load_spec, with_mtp
from miles.errors import CheckpointError
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import load_published, to_published


@pytest.fixture
def source(make_decoder: Callable, tmp_path: Path) -> Path:
    """A checkpoint in two shards, with a tokenizer beside it."""
    decoder = make_decoder()
    write_hf(tmp_path / "source", decoder.spec, to_published(decoder), max_shard_bytes=4000)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def test_the_copy_holds_the_source_bit_for_bit_and_fresh_mtp_layers(source: Path, tmp_path: Path) -> None:
    plan = plan_conversion(open_source(source), tmp_path / "target", Wanted(mtp_num_layers=2))
    assert not (tmp_path / "target").exists()
    convert(plan)
    before, after = dict(read_hf(source)), dict(read_hf(tmp_path / "target"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert set(after) - set(before) == set(plan.fresh)
    assert plan.num_written == len(after)
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{}"
    spec = load_spec(tmp_path / "target")
    assert spec == with_mtp(load_spec(source), 2)
    draft = MtpDraft(spec)
    load_published(Decoder(spec), after.items(), draft=draft)
    assert (draft.projections[0].hidden_norm == 1).all()
    assert draft.projections[0].fc.std().item() == pytest.approx(spec.initializer_range, rel=0.2)


def test_layers_that_are_there_stay_and_the_missing_are_added(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "one", None, mtp_num_layers=1, seed=1)
    converted(tmp_path / "one", tmp_path / "two", None, mtp_num_layers=2, seed=2)
    one, two = dict(read_hf(tmp_path / "one")), dict(read_hf(tmp_path / "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert all(name.startswith("mtp.layers.1.") for name in set(two) - set(one))


def test_new_layers_are_quantised_like_the_others(source: Path, tmp_path: Path) -> None:
    manifest = converted(source, tmp_path / "target", "fp8", mtp_num_layers=1)
    weights = manifest["weights"]
    assert weights["mtp.layers.0.self_attn.q_proj.weight"]["to"].startswith("fp8")
    assert weights["mtp.fc.weight"]["to"] == "fp32"
    converted(tmp_path / "target", tmp_path / "kept", "fp8", mtp_num_layers=1)


def test_what_adds_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "one", None, mtp_num_layers=1)
    with pytest.raises(CheckpointError, match="has 1 MTP layers already"):
        plan_conversion(open_source(tmp_path / "one"), tmp_path / "again", Wanted(mtp_num_layers=1))
    converted(source, tmp_path / "fp8", "fp8")
    with pytest.raises(CheckpointError, match="quantised weights as they are"):
        plan_conversion(open_source(tmp_path / "fp8"), tmp_path / "target", Wanted(mtp_num_layers=1))
    change_config(source, hidden_size=12)
    with pytest.raises(CheckpointError, match="wrong shape"):
        open_source(source)
