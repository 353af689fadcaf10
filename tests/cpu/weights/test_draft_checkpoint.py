"""Drafts from checkpoints of their own: recognised, checked against their model, and computed as published.

The checkpoints are made here; the formulas are written out once more, plainly, from SGLang's `llama_eagle.py`
and `llama_eagle3.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from miles.arch import ArchSpec, spec_from_hf_config, with_mtp
from miles.arch.draft_checkpoint import DraftCheckpoint, eagle_tensors, read_draft
from miles.errors import CheckpointError
from miles.models.attention import CachedAttention, PackedAttention
from miles.models.decoder import Decoder, Taps
from miles.models.kv_cache import KVCache
from miles.models.mtp import MtpDraft
from miles.models.routing import Router
from miles.weights.draft_checkpoint import load_draft
from miles.weights.hf import write_hf
from miles.weights.native_map import mtp_to_published, to_published

VOCAB, WIDTH, DRAFT_VOCAB = 23, 16, 11
TARGET = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EAGLE = {
    "architectures": ["LlamaForCausalLMEagle"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
}
EAGLE3 = EAGLE | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB}

Tensors = dict[str, Tensor]


@pytest.fixture
def target() -> Decoder:
    decoder = Decoder(spec_from_hf_config(TARGET))
    decoder.init_weights(torch.Generator().manual_seed(0))
    return decoder


def write(directory: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def random_tensors(layer: str, joined: int, attended: int, norms: tuple[str, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {
        "fc.weight": draw(WIDTH, joined * WIDTH),
        f"{layer}.self_attn.q_proj.weight": draw(WIDTH, attended * WIDTH),
        f"{layer}.self_attn.k_proj.weight": draw(WIDTH // 2, attended * WIDTH),
        f"{layer}.self_attn.v_proj.weight": draw(WIDTH // 2, attended * WIDTH),
        f"{layer}.self_attn.o_proj.weight": draw(WIDTH, WIDTH),
        f"{layer}.mlp.gate_proj.weight": draw(20, WIDTH),
        f"{layer}.mlp.up_proj.weight": draw(20, WIDTH),
        f"{layer}.mlp.down_proj.weight": draw(WIDTH, 20),
    }
    return tensors | {name: 1 + draw(WIDTH) for name in norms}


def eagle_weights() -> Tensors:
    return random_tensors("layers.0", 2, 1, ("layers.0.post_attention_layernorm.weight",))


def eagle3_weights() -> Tensors:
    norms = ("midlayer.post_attention_layernorm.weight", "midlayer.input_layernorm.weight")
    tensors = random_tensors("midlayer", 3, 2, (*norms, "midlayer.hidden_norm.weight", "norm.weight"))
    ids = torch.arange(DRAFT_VOCAB) * 2
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[ids] = True
    head = torch.randn(DRAFT_VOCAB, WIDTH, generator=torch.Generator().manual_seed(2))
    return tensors | {"lm_head.weight": head, "d2t": ids - torch.arange(DRAFT_VOCAB), "t2d": known}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotate(x: Tensor) -> Tensor:
    """Llama's rotation of one head [T, d] at positions 0, 1, …, theta 10000."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(len(x)).float(), 10000.0 ** -(torch.arange(half) / half))
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
    )


def llama_layer(w: Tensors, layer: str, attended: Tensor, residual: Tensor) -> Tensor:
    """Causal attention of two query heads over one key head, then SwiGLU; one sequence [T, D]."""
    q, k, v = (attended @ w[f"{layer}.self_attn.{letter}_proj.weight"].t() for letter in "qkv")
    k, ahead = rotate(k), torch.full((len(q), len(q)), -math.inf).triu(1)
    heads = [torch.softmax(rotate(h) @ k.t() / math.sqrt(8) + ahead, -1) @ v for h in q.split(8, -1)]
    hidden = residual + torch.cat(heads, -1) @ w[f"{layer}.self_attn.o_proj.weight"].t()
    x = norm(hidden, w[f"{layer}.post_attention_layernorm.weight"])
    up = F.silu(x @ w[f"{layer}.mlp.gate_proj.weight"].t()) * (x @ w[f"{layer}.mlp.up_proj.weight"].t())
    return hidden + up @ w[f"{layer}.mlp.down_proj.weight"].t()


def eagle_formula(w: Tensors, embed: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    mixed = torch.cat((embed[tokens], hidden), -1) @ w["fc.weight"].t()
    return llama_layer(w, "layers.0", mixed, mixed)


def eagle3_formula(w: Tensors, embed: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    x = norm(embed[tokens], w["midlayer.input_layernorm.weight"])
    attended = torch.cat((x, norm(hidden, w["midlayer.hidden_norm.weight"])), -1)
    return llama_layer(w, "midlayer", attended, hidden)


@pytest.fixture
def sequence() -> tuple[Tensor, Tensor]:
    """Nine tokens and their positions."""
    return torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(5)), torch.arange(9)


def packed() -> PackedAttention:
    """The attention of `sequence` for one model: another has other heads."""
    return PackedAttention(torch.tensor([0, 9]))


@torch.no_grad()
def test_eagle_reads_embedding_and_hidden_state(target, sequence, tmp_path: Path) -> None:
    weights = eagle_weights()
    found = read_draft(write(tmp_path / "eagle", EAGLE, weights), target.spec)
    assert (found.layout, found.taps) == ("eagle", ())
    draft = load_draft(found, torch.float32)
    tokens, positions = sequence
    hidden = target(tokens, positions, packed(), Router.decide())
    following = tokens.roll(-1)
    features = draft(hidden, following, positions, packed(), target)
    expected = eagle_formula(weights, target.embed, hidden, following)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draft.logits(features, target), expected @ target.head_weight.t())
    deeper = draft(features, following, positions, packed(), target, depth=1)
    torch.testing.assert_close(
        deeper, eagle_formula(weights, target.embed, expected, following), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 5, 2]}}])
def test_eagle3_fuses_three_layers_and_speaks_its_own_vocabulary(
    config, target, sequence, tmp_path: Path
) -> None:
    weights = eagle3_weights()
    found = read_draft(write(tmp_path / "eagle3", EAGLE3 | config, weights), target.spec)
    assert found.taps == ((1, 6, 3) if config else (2, 3, 3))
    draft = load_draft(found, torch.float32)
    tokens, positions = sequence
    taps = Taps(found.taps)
    target(tokens, positions, packed(), Router.decide(), taps)
    streams = [target.embed[tokens]]
    rotation = target.numerics.rotations(target.spec.layers[0].attention, 64, positions)
    for layer in target.layers:
        streams.append(layer(streams[-1], rotation, packed(), Router.decide()))
    fused = torch.cat([streams[i] for i in found.taps], -1)
    assert torch.equal(taps.joined(), fused)
    following = tokens.roll(-1)
    features = draft(fused, following, positions, packed(), target)
    first = eagle3_formula(weights, target.embed, fused @ weights["fc.weight"].t(), following)
    torch.testing.assert_close(features, first, atol=1e-5, rtol=1e-5)
    own = norm(first, weights["norm.weight"]) @ weights["lm_head.weight"].t()
    logits = draft.logits(features, target)
    torch.testing.assert_close(logits[:, 0 : 2 * DRAFT_VOCAB : 2], own, atol=1e-5, rtol=1e-4)
    assert (logits[:, 1::2] == -math.inf).all() and logits.shape == (9, VOCAB)
    deeper = draft(features, following, positions, packed(), target, depth=1)
    torch.testing.assert_close(
        deeper, eagle3_formula(weights, target.embed, first, following), atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_stepping_over_a_cache_equals_a_packed_pass(kind, target, sequence, tmp_path: Path) -> None:
    config, weights = (EAGLE, eagle_weights()) if kind == "eagle" else (EAGLE3, eagle3_weights())
    draft = load_draft(read_draft(write(tmp_path / kind, config, weights), target.spec), torch.float32)
    tokens, positions = sequence
    taps = Taps(draft.taps)
    hidden = target(tokens, positions, packed(), Router.decide(), taps)
    hidden = taps.joined() if draft.taps else hidden
    whole = draft(hidden, tokens, positions, packed(), target)
    cache = KVCache(draft.arch, 1, 16)
    for row in range(9):
        at = torch.tensor([row])
        out = draft(hidden[at], tokens[at], at, CachedAttention(cache, at), target)
        assert (out - whole[at]).abs().max() < 2e-5


def test_an_own_embedding_and_a_bias_are_used(target, sequence, tmp_path: Path) -> None:
    plain = load_draft(
        read_draft(write(tmp_path / "plain", EAGLE, eagle_weights()), target.spec), torch.float32
    )
    more = {"embed_tokens.weight": torch.ones(VOCAB, WIDTH), "fc.bias": torch.ones(WIDTH)}
    found = read_draft(write(tmp_path / "more", EAGLE, eagle_weights() | more), target.spec)
    draft = load_draft(found, torch.float32)
    assert found.own_embedding and found.fc_bias
    tokens, positions = sequence
    hidden = torch.zeros(9, WIDTH)
    features = draft(hidden, tokens, positions, packed(), target)
    # The embedding of every token is the same here, so all rows are.
    assert torch.allclose(features, features[:1].expand(9, -1), atol=1e-5)
    assert not torch.allclose(features, plain(hidden, tokens, positions, packed(), target))
    assert torch.equal(draft.embed, more["embed_tokens.weight"])
    assert torch.equal(draft.fc_bias, more["fc.bias"])


def test_mtp_layers_come_alone_or_inside_a_checkpoint(target, tmp_path: Path) -> None:
    draft = MtpDraft(with_mtp(target.spec, 1))
    draft.init_weights(torch.Generator().manual_seed(4))
    config = TARGET | {"num_nextn_predict_layers": 1}
    alone = write(tmp_path / "alone", config, dict(mtp_to_published(draft)))
    write_hf(tmp_path / "whole", draft.spec, to_published(target, draft))
    for directory in (alone, tmp_path / "whole"):
        found = read_draft(directory, target.spec)
        assert found.layout == "mtp"
        loaded = load_draft(found, torch.float32)
        for name, parameter in draft.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name)), name


def changed(tensors: Tensors, **changes: Tensor | None) -> Tensors:
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (tensors | named).items() if tensor is not None}


REFUSED = {
    "another width": (EAGLE | {"hidden_size": 32}, eagle_weights(), "hidden_size is 32, the model's is 16"),
    "another vocabulary": (
        EAGLE3 | {"vocab_size": 24},
        eagle3_weights(),
        "vocab_size is 24, the model",
    ),
    "no draft": (EAGLE, {"model.norm.weight": torch.ones(WIDTH)}, "not a draft"),
    "missing tensor": (
        EAGLE,
        changed(eagle_weights(), layers__0__mlp__up_proj__weight=None),
        "missing .*up_proj",
    ),
    "two layers": (EAGLE | {"num_hidden_layers": 2}, eagle_weights(), "only drafts of 1 layer"),
    "two fused layers": (EAGLE3, changed(eagle3_weights(), fc__weight=torch.ones(16, 32)), "fc.weight is"),
    "a layer too far": (
        EAGLE3 | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 6]}},
        eagle3_weights(),
        "has layers 0 to 5",
    ),
    "own vocabulary of another size": (EAGLE3 | {"draft_vocab_size": 12}, eagle3_weights(), "d2t is"),
    "unknown depth of MTP": (TARGET, {"mtp.fc.weight": torch.ones(16, 32)}, "does not say how many layers"),
    "MTP of another shape": (
        TARGET | {"num_nextn_predict_layers": 1},
        {"mtp.fc.weight": torch.ones(16, 16)},
        "not those of a Qwen3MoeForCausalLM",
    ),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(config, tensors, message, target, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_draft(write(tmp_path / "draft", config, tensors), target.spec)


@pytest.mark.parametrize("broken", ["beyond", "twice", "unmarked"])
def test_a_vocabulary_map_that_contradicts_itself_is_refused(broken, target, tmp_path: Path) -> None:
    weights = eagle3_weights()
    if broken == "beyond":
        weights["d2t"][-1] = VOCAB
    if broken == "twice":
        weights["d2t"][1] = weights["d2t"][0] - 1
    if broken == "unmarked":
        weights["t2d"][0] = False
    found = read_draft(write(tmp_path / "draft", EAGLE3, weights), target.spec)
    with pytest.raises(CheckpointError, match="d2t and t2d do not describe one vocabulary"):
        load_draft(found, torch.float32)


def test_every_tensor_of_a_draft_has_a_place(target, tmp_path: Path) -> None:
    for name, config, weights in (("a", EAGLE, eagle_weights()), ("b", EAGLE3, eagle3_weights())):
        found: DraftCheckpoint = read_draft(write(tmp_path / name, config, weights), target.spec)
        assert set(eagle_tensors(found)) == set(weights)


def test_a_small_model_needs_named_layers(tmp_path: Path) -> None:
    spec: ArchSpec = spec_from_hf_config(TARGET | {"num_hidden_layers": 2})
    with pytest.raises(CheckpointError, match="eagle_aux_hidden_state_layer_ids is missing"):
        read_draft(write(tmp_path / "draft", EAGLE3, eagle3_weights()), spec)


def test_a_directory_without_a_config_is_refused(target, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    save_file(eagle_weights(), tmp_path / "draft" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_draft(tmp_path / "draft", target.spec)
