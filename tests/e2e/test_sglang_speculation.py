"""A draft of MTP layers on the real stack: served by SGLang, trained by Megatron, sent to the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from e2e_support import Cli, metrics_of
from sglang_support import ATTACHED, CONTEXT, TRAIN, sample_of, serving, settle

from miles.arch import load_spec
from miles.data.batch import pack
from miles.data.tasks import resolve_builtin
from miles.data.tokenizer import CheckpointTokenizer
from miles.http_client import HttpClient
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.sglang.engine import SglangEngine, SglangSettings
from miles.rollout.sglang.probe import probe
from miles.rollout.sglang.server import ServerProcess
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.settings import OptimizerSettings, TrainerSettings
from miles.weights.hf import read_hf

pytestmark = pytest.mark.scale

STEPS = 3


@pytest.fixture(scope="module")
def untaught(warm_checkpoint: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm-started policy with one MTP layer of random weights."""
    made = tmp_path_factory.mktemp("untaught") / "checkpoint"
    done = Cli(shared_cache, made.parent)("convert", str(warm_checkpoint), str(made), "--mtp-num-layers", "1")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def server(untaught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    guesses = {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": STEPS,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": STEPS + 1,
        "speculative_draft_model_path": str(untaught),
    }
    with serving(untaught, tmp_path_factory.mktemp("guessing") / "server.log", guesses) as started:
        yield started


def test_a_draft_served_by_sglang_learns_in_megatron_and_guesses_better(
    cli: Cli, server: ServerProcess, untaught: Path
) -> None:
    """Routes are replayed and log-probs are the policy's own, as without guessing ahead."""
    words = list(TRAIN)
    words[words.index("quickstart")] = "quickstart-mtp"
    size = ("--num-rollout", "10", "--lr", "1e-3", "--lr-warmup-iters", "0", "--skip-eval-before-train")
    start = ("--hf-checkpoint", str(untaught), "--train-backend", "megatron")
    done = cli(*words, *size, *start, *ATTACHED, server.url)
    assert done.returncode == 0, done.stderr
    rows = [row for step, row in sorted(metrics_of(cli.only_run()).items()) if step]
    lengths = [row["rollout/spec_accept_length"] for row in rows]
    print("tokens per verification:", " ".join(f"{length:.2f}" for length in lengths))
    assert lengths[0] < 1.3, "random guesses"
    assert np.mean(lengths[-3:]) > lengths[0] + 0.3
    for row in rows:
        assert row["train/train_rollout_logprob_abs_diff"] < 1e-5 and row["route/replayed_rows_frac"] == 1.0
        assert row["rollout/spec_accept_rate/depth_1"] > 0
    assert rows[-1]["rollout/spec_accept_rate/depth_1"] > rows[0]["rollout/spec_accept_rate/depth_1"]


def test_a_draft_trained_by_megatron_and_sent_alone_guesses_better(
    server: ServerProcess, untaught: Path
) -> None:
    """The policy stays as it is: its text and its log-probs do not notice what guesses for it."""
    spec = load_spec(untaught)
    engine = SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=CONTEXT))
    # Without weight decay, and with rewards that are all alike, the draft alone learns.
    settings = TrainerSettings(
        optimizer=OptimizerSettings(lr=3e-3), train_mtp=True, mtp_training_steps=STEPS, probe_tokens=0
    )
    trainer = MegatronTrainer(spec, settings, source_dir=untaught)
    trainer.load_weights(read_hf(untaught))
    prompts = task_prompts(untaught, 64)

    async def scenario() -> tuple[list[GenerateOutput], list[GenerateOutput]]:
        await engine.receive_weights(read_hf(untaught), version=1)
        await probe(engine, 1, speculative=True)
        before = await engine.generate(requests(prompts, temperature=0.0))
        for _ in range(15):
            asked = requests(prompts, temperature=1.0)
            answers = await engine.generate(asked)
            samples = [sample_of(i, *pair) for i, pair in enumerate(zip(asked, answers, strict=True))]
            trainer.train_step(pack([replace(sample, reward=0.0) for sample in samples], None))
        draft = [(name, tensor) for name, tensor in trainer.named_weights() if name.startswith("mtp.")]
        await engine.receive_weights(draft, version=2)
        return before, await engine.generate(requests(prompts, temperature=0.0))

    before, after = settle(scenario())
    assert [output.output_ids for output in after] == [output.output_ids for output in before]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new.log_probs, old.log_probs, atol=1e-5)
    untrained, trained = accept_length(before), accept_length(after)
    print(f"tokens per verification: {untrained:.2f} before, {trained:.2f} after the draft was sent")
    assert trained > untrained + 0.3


def task_prompts(checkpoint: Path, count: int) -> list[list[int]]:
    """Prompts of the task, each twice."""
    tokenizer = CheckpointTokenizer(checkpoint)
    lines = resolve_builtin("builtin:sort/test").read_text().splitlines()[: count // 2]
    return [
        tokenizer.encode(json.loads(line)["input"], add_special_tokens=False) for line in lines for _ in "ab"
    ]


def requests(prompts: list[list[int]], temperature: float) -> list[GenerateRequest]:
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature)
    return [
        GenerateRequest(input_ids=ids, sampling=sampling, sample_key=i, group=i)
        for i, ids in enumerate(prompts)
    ]


def accept_length(outputs: list[GenerateOutput]) -> float:
    """Tokens per verification, over all of them."""
    infos = [output.spec_info for output in outputs if output.spec_info]
    return 1 + sum(info.accepted_tokens for info in infos) / sum(info.verify_steps for info in infos)
