"""Every family against transformers: same weights, same logits, gradients, files and continuations."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from miles.arch import check_weights, load_spec, spec_from_hf_config, to_hf_config
from miles.arch.checkpoint import read_json
from miles.arch.expert_layout import is_stack
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.kv_cache import KVCache
from miles.models.logprob import token_log_probs
from miles.models.numerics import FAST
from miles.models.routing import Router
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import load_published, published_views, to_published
from miles.weights.stacked_experts import split_stack
from tests.cpu.families.tiny_checkpoints import CASES, LENGTHS, reference_logits, sequences

NEW_TOKENS = 12
"""Every prompt ends beyond the windows and chunks of the models."""
FAMILIES = pytest.mark.parametrize("name", CASES)
GRADIENT_TOLERANCE = 1e-4
"""Of the largest element of a tensor."""
ILL_CONDITIONED = {"gemma3n_text": 2e-4}
"""Streams predicted and corrected from each other lose digits: the reference's own gradients move by 3e-5
between fp32 and fp64, and on one kind of processor the two sides are 1.0001e-4 apart."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    root = tmp_path_factory.mktemp("families")
    return {name: (root / name, case.save(root / name)) for name, case in CASES.items()}


def decoder_of(directory: Path) -> Decoder:
    spec = load_spec(directory)
    check_weights(spec, directory)
    decoder = Decoder(spec)
    load_published(decoder, read_hf(directory))
    return decoder


def packed(decoder: Decoder, tokens: list[Tensor]) -> Tensor:
    """Hidden states of sequences in one forward."""
    lengths = [len(sequence) for sequence in tokens]
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0))
    return decoder(torch.cat(tokens), positions, attention, Router.decide())


def reference_gradients(model: nn.Module, decoder: Decoder) -> dict[str, Tensor]:
    """Gradients under published names: transformers stacks experts that a checkpoint holds one by one."""
    root = "model.language_model." if decoder.spec.root == "language_model.model" else "model."
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        name = name.replace(root, f"{decoder.spec.root}.", 1)
        moe = decoder.spec.moe
        if is_stack(name) and moe is not None and not moe.stacked:
            found |= dict(split_stack(name, parameter.grad.mT))
        else:
            found[name] = parameter.grad
    return found


@FAMILIES
def test_logits_and_gradients_are_those_of_transformers(name: str, checkpoints, request) -> None:
    directory, reference = checkpoints[name]
    decoder = decoder_of(directory)
    tokens = sequences(CASES[name])
    expected = torch.cat([reference_logits(reference, sequence) for sequence in tokens])
    hidden = packed(decoder, tokens)
    assert expected.abs().max() > 1
    assert (decoder.logits(hidden) - expected).abs().max() <= 1e-4

    targets = torch.randint(
        decoder.spec.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)
    )
    weighting = torch.randn(len(targets), generator=torch.Generator().manual_seed(2))
    wanted = torch.log_softmax(expected, -1).gather(1, targets[:, None])[:, 0]
    log_probs, entropy = token_log_probs(
        hidden, decoder.head_weight, targets, with_entropy=True, softcap=decoder.spec.logit_softcap
    )
    assert entropy is not None
    entropies = torch.distributions.Categorical(logits=expected).entropy()
    assert (entropy - entropies).abs().max() <= 1e-4
    reference.zero_grad()
    (wanted @ weighting + entropies.sum()).backward()
    (log_probs @ weighting + entropy.sum()).backward()
    gradients = reference_gradients(reference, decoder)
    native = {key: parameter.grad for key, parameter in decoder.named_parameters()}
    tolerance = ILL_CONDITIONED.get(name, GRADIENT_TOLERANCE)
    for key, grad in published_views(decoder.spec, native):
        scale = gradients[key].abs().max()
        assert (grad - gradients[key]).abs().max() <= tolerance * scale, key


@pytest.mark.slow
@FAMILIES
def test_layers_that_run_again_in_backward_have_the_same_gradients(name: str, checkpoints) -> None:
    directory, _ = checkpoints[name]
    tokens, gradients = sequences(CASES[name], (19, 6)), []
    for again in (False, True):
        decoder = decoder_of(directory)
        if again:
            decoder.recompute_num_layers = decoder.spec.num_layers
            decoder.recompute(frozenset({"core_attn", "mlp"}))
        packed(decoder, tokens).square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3n"])
def test_towers_and_unused_keys_are_read_and_written_back(name: str, checkpoints, tmp_path: Path) -> None:
    """As published: another prefix, tensors of towers, keys of layers that use those of others."""
    directory, _ = checkpoints["gemma3n_text"]
    config = read_json(directory / "config.json")
    outer = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}
    spec = spec_from_hf_config(outer | {"text_config": config, "torch_dtype": "float32"})
    tensors = {key.replace("model.", "model.language_model.", 1): x for key, x in read_hf(directory)}
    tensors["model.vision_tower.stem.weight"] = torch.randn(3, 2)
    last, width = spec.num_layers - 1, spec.layers[-1].attention.kv_width
    tensors[f"{spec.root}.layers.{last}.self_attn.k_proj.weight"] = torch.randn(width, spec.hidden_size)
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(outer | {"text_config": config, "torch_dtype": "float32"}))
    assert load_spec(source) == spec == spec_from_hf_config(to_hf_config(spec))
    decoder = decoder_of(source)
    assert torch.equal(
        packed(decoder, sequences(CASES["gemma3n_text"])),
        packed(decoder_of(directory), sequences(CASES["gemma3n_text"])),
    )
    write_hf(tmp_path / "again", spec, to_published(decoder), source_dir=source)
    again = dict(read_hf(tmp_path / "again"))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@FAMILIES
def test_published_tensors_come_back_bit_for_bit(name: str, checkpoints, tmp_path: Path) -> None:
    directory, reference = checkpoints[name]
    decoder = decoder_of(directory)
    write_hf(
        tmp_path / "native", decoder.spec, to_published(decoder), source_dir=directory, max_shard_bytes=20_000
    )
    assert load_spec(tmp_path / "native") == decoder.spec
    before, after = dict(read_hf(directory)), dict(read_hf(tmp_path / "native"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    again = CASES[name].load(tmp_path / "native")
    (tokens,) = sequences(CASES[name], (19,))
    with torch.no_grad():
        assert torch.equal(reference_logits(again, tokens), reference_logits(reference, tokens))


@FAMILIES
@torch.no_grad()
def test_reading_over_a_cache_equals_a_full_forward(name: str, checkpoints) -> None:
    decoder = decoder_of(checkpoints[name][0])
    tokens = sequences(CASES[name], (29, 22))
    whole = packed(decoder, tokens)
    ends, read = [29, 22], 9
    cache = KVCache(decoder.spec, num_slots=2, max_len=40)
    starts = torch.tensor([0, read, 2 * read])
    prompts = torch.cat([sequence[:read] for sequence in tokens])
    prefill = PackedAttention(starts, cache, torch.tensor([0, 1]))
    decoder(prompts, torch.arange(read).repeat(2), prefill, Router.decide())
    # The first sequence reads on in a chunk, then both go on token by token.
    chunk = FAST.chunk_attention(cache, 0, read, 8)
    hidden = decoder(tokens[0][read : read + 8], torch.arange(read, read + 8), chunk, Router.decide())
    assert (hidden - whole[read : read + 8]).abs().max() <= 1e-4
    lengths = [read + 8, read]
    for _ in range(11):
        at = torch.tensor(lengths)
        step = torch.stack([sequence[length] for sequence, length in zip(tokens, lengths, strict=True)])
        hidden = decoder(step, at, FAST.cached_attention(cache, at), Router.decide())
        rows = at + torch.tensor([0, ends[0]])
        assert (hidden - whole[rows]).abs().max() <= 1e-4
        lengths = [length + 1 for length in lengths]


def generate(name: str, directory: Path, prompts: list[Tensor], **settings) -> list[list[int]]:
    """Greedy continuations by the native engine, all prompts together."""
    decoder = decoder_of(directory).requires_grad_(False)
    engine = NativeEngine(
        decoder.spec, EngineSettings(max_context_len=64, max_running_requests=4, seed=1, **settings)
    )
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)

    async def run() -> list[list[int]]:
        await engine.receive_weights(to_published(decoder), version=0)
        requests = [
            GenerateRequest(input_ids=prompt.tolist(), sampling=sampling, sample_key=i, group=i)
            for i, prompt in enumerate(prompts)
        ]
        outputs = await asyncio.gather(*(engine.generate([request]) for request in requests))
        return [list(output.output_ids) for (output,) in outputs]

    return asyncio.run(run())


@FAMILIES
@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(name: str, checkpoints) -> None:
    directory, reference = checkpoints[name]
    prompts = sequences(CASES[name], (3, 17, 8))
    expected = [continued(reference, prompt, NEW_TOKENS) for prompt in prompts]
    assert generate(name, directory, prompts) == expected
    assert generate(name, directory, prompts, max_prefill_tokens=5) == expected
    guessing = SpeculationSettings(algorithm="NGRAM", num_steps=3, num_draft_tokens=4)
    assert generate(name, directory, prompts, speculation=guessing) == expected


def continued(model: nn.Module, prompt: Tensor, count: int) -> list[int]:
    """The best token again and again, each from a full forward."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, reference_logits(model, tokens)[-1].argmax()[None]])
    return tokens[len(prompt) :].tolist()
