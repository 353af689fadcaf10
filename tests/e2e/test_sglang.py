"""Real SGLang servers (`make sglang-cpu`): what they answer, what they learn, and what survives a loss.

Run by `make test-scale`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from e2e_support import PATIENCE_S, SAMPLING, Cli, summary_of
from preloaded import Pause
from sglang_support import ATTACHED, CONTEXT, PYTHON, REPOSITORY, TRAIN, sample_of, serving, settle

from miles.arch import ArchSpec, load_spec
from miles.config.sglang_table import TABLE
from miles.data.batch import pack
from miles.data.sample import Sample
from miles.data.tokenizer import CheckpointTokenizer
from miles.http_client import HttpClient
from miles.models import mlp
from miles.orchestration.disk_weights import DiskWeights
from miles.orchestration.sglang_servers import ServedEngine, TensorPacket
from miles.orchestration.weight_packets import pack as pack_weights
from miles.orchestration.weight_sender import WeightSender
from miles.planning.facts.server import ENVIRONMENT
from miles.record import RunReader
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.rollout.served_teacher import ServedTeachers
from miles.rollout.sglang.engine import SglangEngine, SglangSettings
from miles.rollout.sglang.probe import probe
from miles.rollout.sglang.server import ServerProcess
from miles.rollout.sglang.weight_payload import with_tied_head
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.weights.hf import read_hf

pytestmark = [pytest.mark.scale, pytest.mark.usefixtures("no_server_is_left")]


@pytest.fixture(scope="module")
def checkpoint(warm_checkpoint: Path) -> Path:
    return warm_checkpoint


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> ArchSpec:
    return load_spec(checkpoint)


@pytest.fixture(scope="module")
def server(sglang_server: ServerProcess) -> ServerProcess:
    return sglang_server


@pytest.fixture
def engine(server: ServerProcess, spec: ArchSpec) -> SglangEngine:
    return SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=CONTEXT))


def requests(count: int, new: int = 24) -> list[GenerateRequest]:
    sampling = SamplingParams(max_new_tokens=new)
    rng = np.random.default_rng(0)
    return [
        GenerateRequest(
            input_ids=rng.integers(3, 55, size=40 + i % 5).tolist(), sampling=sampling, sample_key=i, group=i
        )
        for i in range(count)
    ]


TRIES = 20
"""Of a test that must meet requests under way: a busy machine may let one moment pass."""


async def decoding(engine: SglangEngine, answer: asyncio.Task[list[GenerateOutput]]) -> None:
    """Return when requests run in the server, or have all been answered."""
    running = 0
    while not running and not answer.done():
        loads = (await engine.http.get("/v1/loads")).json()["loads"]
        running = sum(load["num_running_reqs"] for load in loads)


def moved(checkpoint: Path, seed: int) -> list[tuple[str, torch.Tensor]]:
    """The checkpoint's weights with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, tensor + 0.02 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in read_hf(checkpoint)
    ]


def test_a_served_teacher_gives_the_trainers_log_probs(
    engine: SglangEngine, server: ServerProcess, spec: ArchSpec, checkpoint: Path
) -> None:
    """Of other weights than those that sampled: nothing is generated, the responses are only read."""
    weights = moved(checkpoint, seed=3)

    async def scenario() -> list[Sample]:
        await engine.receive_weights(moved(checkpoint, seed=4), version=1)
        asked = requests(6)
        outputs = await engine.generate(asked)
        samples = [sample_of(i, *pair) for i, pair in enumerate(zip(asked, outputs, strict=True))]
        await engine.receive_weights(weights, version=2)
        await ServedTeachers([server.url], "teacher").advise(samples)
        return samples

    batch = pack(settle(scenario()))
    trainer = NativeTrainer(spec, TrainerSettings())
    trainer.load_teacher(spec.policy, weights)
    assert trainer.teacher is not None and batch.teacher_log_probs is not None
    expected, trained = trainer.teacher.log_probs(batch), batch.loss_mask > 0
    np.testing.assert_allclose(batch.teacher_log_probs[trained], expected[trained], atol=1e-4)
    assert np.abs(expected - batch.rollout_log_probs)[trained].max() > 1e-2, "the teacher is another model"


def test_a_server_listens_on_loopback_only(server: ServerProcess) -> None:
    main = psutil.Process(server.pid)
    listening = [
        connection.laddr.ip
        for process in (main, *main.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}


def test_the_argument_table_is_that_of_this_server() -> None:
    made = json.loads((REPOSITORY / ENVIRONMENT / "sglang_args.json").read_text())
    assert json.loads(TABLE.read_text()) == made


def test_routes_and_log_probs_agree_with_the_native_engine(
    engine: SglangEngine, spec: ArchSpec, checkpoint: Path
) -> None:
    async def scenario() -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
        weights = moved(checkpoint, seed=1)
        await engine.receive_weights(weights, version=1)
        asked = requests(16)
        outputs = await engine.generate(asked)
        native = NativeEngine(spec, EngineSettings(max_context_len=CONTEXT, seed=0))
        await native.receive_weights(weights, version=1)
        one = SamplingParams(max_new_tokens=1)
        again = await native.generate(
            [
                replace(
                    request, input_ids=[*request.input_ids, *output.output_ids][:-1], sampling=one, group=None
                )
                for request, output in zip(asked, outputs, strict=True)
            ]
        )
        gaps = [
            float(np.abs(output.log_probs - _log_probs(native, request, output)).max())
            for request, output in zip(asked, outputs, strict=True)
        ]
        return [o.routed_experts for o in outputs], [o.routed_experts for o in again], gaps  # type: ignore[misc]

    served, native, gaps = settle(scenario())
    assert max(gaps) < 1e-4
    ours, theirs = np.concatenate(native), np.concatenate(served)
    assert ours.shape == theirs.shape
    agreeing = (np.sort(ours, -1) == np.sort(theirs, -1)).all((1, 2)).mean()
    print(f"routes agree on {agreeing:.4%} of {len(ours)} tokens, log-probs to {max(gaps):.1e}")
    assert agreeing >= 0.99
    shifted = np.roll(theirs, 1, axis=0)
    assert (np.sort(ours, -1) == np.sort(shifted, -1)).all((1, 2)).mean() < 0.9, "shifted routes are noticed"


def _log_probs(native: NativeEngine, request: GenerateRequest, output: GenerateOutput) -> np.ndarray:
    """Of the response, at temperature 1, by the native decoder."""
    tokens = [*request.input_ids, *output.output_ids]
    hidden = native.rescore(tokens, len(request.input_ids))["final norm"]
    log_probs = torch.log_softmax(hidden @ native.decoder.embed.T, dim=-1)[:-1]
    chosen = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return chosen[len(request.input_ids) - 1 :].numpy()


def test_every_way_to_hand_weights_over_gives_the_same_weights(
    engine: SglangEngine, spec: ArchSpec, checkpoint: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        before = await engine.control.checksum()
        await engine.receive_weights(moved(checkpoint, seed=2), version=5)
        whole = await engine.control.checksum()
        await engine.receive_weights(moved(checkpoint, seed=3), version=6)
        other = await engine.control.checksum()
        in_buckets = SglangEngine(engine.http, spec, replace(engine.settings, bucket_bytes=20_000))
        await in_buckets.receive_weights(moved(checkpoint, seed=2), version=7)
        assert await engine.control.checksum() == whole
        await engine.receive_weights(moved(checkpoint, seed=3), version=8)
        disk = DiskWeights(lambda: moved(checkpoint, seed=2), spec, checkpoint, tmp_path)
        packet = await disk.weights(9)
        await engine.receive_checkpoint(packet.directory, packet.version)
        assert await engine.control.checksum() == whole
        await broadcast(engine, moved(checkpoint, seed=3), 10, bucket_bytes=512 * 1024**2)
        assert await engine.control.checksum() == other
        await broadcast(engine, moved(checkpoint, seed=2), 11, bucket_bytes=20_000)
        assert await engine.control.checksum() == whole
        # What never differed from the checkpoint that the server began with is not written.
        begun = list(read_hf(checkpoint))
        await engine.receive_weights(begun, version=12)
        changed = [(name, t + 0.1 if "experts" in name or "embed" in name else t) for name, t in begun]
        some = DiskWeights(lambda: changed, spec, checkpoint, tmp_path, base=checkpoint)
        packet = await some.weights(13)
        await engine.receive_checkpoint(packet.directory, packet.version)
        partly, bytes_of_some = await engine.control.checksum(), engine.sent_bytes
        await engine.receive_weights(changed, version=14)
        assert await engine.control.checksum() == partly and bytes_of_some < engine.sent_bytes
        assert len({before, whole, other, partly}) == 4
        assert await engine.control.weight_version() == 14
        await probe(engine, version=14)

    settle(scenario())


async def broadcast(
    engine: SglangEngine, weights: list[tuple[str, torch.Tensor]], version: int, bucket_bytes: int
) -> None:
    """Through a process group of this process and the server."""
    sender = WeightSender(lambda: with_tied_head(weights), bucket_bytes, "cpu")
    meeting = sender.open("127.0.0.1", 2)
    await engine.begin_broadcast(version)
    await asyncio.gather(sender.join(), engine.join_broadcast(meeting, 1))
    last = False
    while not last:
        announced = await sender.next_bucket()
        taken = engine.take_broadcast(meeting.name, announced, version, PATIENCE_S)
        await asyncio.gather(sender.send_bucket(version), taken)
        last = announced.last
    await engine.end_broadcast(version)
    await engine.leave_broadcast(meeting.name)
    await sender.drop()


def test_only_tensors_that_changed_are_sent_again(engine: SglangEngine, checkpoint: Path) -> None:
    """The server holds the same weights as after a whole update, and their bytes are counted."""
    first, second = moved(checkpoint, seed=2), moved(checkpoint, seed=2)
    changed = next(i for i, (name, _) in enumerate(second) if name.endswith("q_proj.weight"))
    second[changed] = (second[changed][0], second[changed][1] + 0.1)
    served = ServedEngine("engine-0", engine, None, delta=True)

    async def sent(weights: list[tuple[str, torch.Tensor]], version: int) -> tuple[float, str]:
        await served.load(TensorPacket(*pack_weights(weights, version)))
        return (await served.metrics())["weight_bytes_sent"], await served.checksum()

    async def scenario() -> None:
        whole, before = await sent(first, 1)
        assert await sent(first, 2) == (0, before)
        some, after = await sent(second, 3)
        assert some == second[changed][1].numel() * 4 < whole
        await engine.receive_weights(first, version=4)
        assert await served.checksum() == before != after
        await engine.receive_weights(second, version=5)
        assert await served.checksum() == after
        assert await engine.control.weight_version() == 5

    settle(scenario())


def test_weights_that_change_in_the_middle_of_a_response_are_named(
    engine: SglangEngine, checkpoint: Path
) -> None:
    async def scenario(before: int, after: int) -> bool:
        await engine.receive_weights(moved(checkpoint, seed=4), version=before)
        answer = asyncio.create_task(engine.generate(requests(8, new=140)))
        await decoding(engine, answer)
        await engine.receive_weights(moved(checkpoint, seed=5), version=after)
        told = []
        for output in await answer:
            told.append([version for version, _ in output.weight_versions])
            assert set(told[-1]) <= {before, after} and len(output.output_ids) == 140
            assert output.routed_experts is not None and (output.routed_experts >= 0).all()
        return told == [[before, after]] * 8

    assert any(settle(scenario(before, before + 1)) for before in range(1, 2 * TRIES, 2))


def test_an_abort_keeps_what_was_sampled(engine: SglangEngine, checkpoint: Path) -> None:
    async def scenario() -> bool:
        await engine.receive_weights(moved(checkpoint, seed=4), version=1)
        answer = asyncio.create_task(engine.generate(requests(8, new=140)))
        await decoding(engine, answer)
        aborted = await engine.abort({0})
        outputs = await answer
        for output in outputs:
            assert len(output.output_ids) == len(output.log_probs) <= 140
        return aborted == sum(output.finish_reason == "abort" for output in outputs) == 8

    assert any(settle(scenario()) for _ in range(TRIES))


def test_memory_is_given_back_and_taken_again(engine: SglangEngine, checkpoint: Path) -> None:
    async def scenario() -> None:
        await engine.receive_weights(moved(checkpoint, seed=4), version=1)
        await engine.control.release_memory(["kv_cache"])
        await engine.control.resume_memory(["kv_cache"])
        assert len((await engine.generate(requests(1)))[0].output_ids) == 24

    settle(scenario())


def test_the_trainer_dispatches_to_the_experts_that_sglang_chose(
    engine: SglangEngine, spec: ArchSpec, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatched: list[torch.Tensor] = []
    run = mlp.routed_experts

    def spy(x: torch.Tensor, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        dispatched.append(ids.clone())
        return run(x, ids, *rest)

    async def sample() -> list[Sample]:
        await engine.receive_weights(moved(checkpoint, seed=1), version=1)
        asked = requests(4)
        outputs = await engine.generate(asked)
        return [sample_of(i, *pair) for i, pair in enumerate(zip(asked, outputs, strict=True))]

    batch = pack(settle(sample()), None)
    trainer = NativeTrainer(spec, TrainerSettings(replay_routes=True, probe_tokens=0), source_dir=checkpoint)
    trainer.load_weights(read_hf(checkpoint))  # other weights than the server's: only replay gives its routes
    monkeypatch.setattr(mlp, "routed_experts", spy)
    metrics = trainer.train_step(batch).metrics
    assert metrics["route/replayed_rows_frac"] == 1.0
    routes = torch.stack(dispatched, 1).to(torch.int16).numpy()
    np.testing.assert_array_equal(routes[: len(batch.routes)], batch.routes)  # type: ignore[arg-type]


def test_a_server_ends_with_the_process_that_started_it(checkpoint: Path, tmp_path: Path) -> None:
    """The leash: killed with no chance to clean up, a run leaves no server behind."""
    code = (
        "import pathlib, sys, time\n"
        "from miles.rollout.sglang.command import ServerOptions\n"
        "from miles.rollout.sglang.server import ServerProcess\n"
        "options = ServerOptions(python=pathlib.Path(sys.argv[1]), args={'model_path': sys.argv[2]},\n"
        "                        log=pathlib.Path(sys.argv[3]))\n"
        "print(ServerProcess(options).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, str(PYTHON), str(checkpoint), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        served = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + PATIENCE_S
        # Nobody may be there to collect what is left of a process whose parent is gone.
        while served.is_running() and served.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_twenty_steps_of_grpo_on_sglang_samples_raise_the_reward(cli: Cli, server: ServerProcess) -> None:
    """The native trainer, attached to a server that others started and that goes on afterwards."""
    learned(cli, "--train-backend", "native", *ATTACHED, server.url)
    assert server.ended is None


def test_twenty_steps_of_megatron_on_sglang_samples_raise_the_reward(cli: Cli) -> None:
    """Real megatron-core, and a server that the run starts and ends."""
    learned(cli, "--train-backend", "megatron")


def learned(cli: Cli, *words: str) -> None:
    """Twenty steps with replayed routes, and new weights over HTTP at each of them, raise the reward."""
    done = cli(*TRAIN, "--num-rollout", "20", "--check-weight-update-equal", *words)
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    summary = summary_of(run)
    print({name: summary[name] for name in ("reward_first5", "reward_last5", "steps")})
    assert summary["status"] == "finished" and summary["steps"] == 20
    assert summary["reward_last5"] - summary["reward_first5"] >= 0.15
    reader = RunReader(run)
    assert set(reader.series("route/replayed_rows_frac").values) == {1.0}
    assert max(reader.series("train/train_rollout_logprob_abs_diff").values) < 1e-5
    compared = [event for event in reader.events() if event["kind"] == "weights_compared"]
    assert [event["version"] for event in compared] == list(range(21))
    assert len({event["checksums"]["engine-0"] for event in compared}) == 21, "new weights at every step"
    assert reader.alerts() == []


def test_a_server_killed_in_the_middle_of_a_rollout_is_replaced(cli: Cli) -> None:
    size = (
        "--num-rollout",
        "4",
        "--rollout-batch-size",
        "16",
        "--num-engines",
        "2",
        "--sample-records-per-step",
        "128",
    )
    words = (*TRAIN, *size, "--check-weight-update-equal", "--skip-eval-before-train")
    process = cli.start_until(Pause(*SAMPLING, call=2), *words)
    run = cli.only_run()
    victim = next(e["pid"] for e in RunReader(run).events("worker_start") if e["worker"] == "engine-0")
    # The run waits for what this server has been asked.
    os.killpg(victim, signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)
    cli.wait_until(lambda: _in_rollout(run, step=2), process)
    time.sleep(0.3)  # Its requests are on their way: lost with it, or asked of the next one.
    assert _in_rollout(run, step=2)
    os.kill(victim, signal.SIGKILL)
    _, err = cli.outcome(process)
    assert process.returncode == 0, err
    reader = RunReader(run)
    events = reader.events()
    kinds = Counter(event["kind"] for event in events)
    assert kinds["worker_dead"] == 1 and kinds["restart"] == 1
    assert not psutil.pid_exists(victim)
    for step in range(1, 5):
        samples = reader.samples(step)
        indices = [sample["index"] for sample in samples]
        assert len(indices) == len(set(indices)) == 16 * 8, "none lost, none twice"
        assert {version for s in samples for version, _ in s["weight_versions"]} == {step - 1}
    compared = [event for event in events if event["kind"] == "weights_compared"]
    assert [event["version"] for event in compared] == [0, 1, 2, 3, 4]
    assert all(len(set(event["checksums"].values())) == 1 for event in compared)


def _in_rollout(run: Path, step: int) -> bool:
    return ("rollout", step) in [(phase.name, phase.step) for phase in RunReader(run).history.open_phases()]


@pytest.mark.parametrize(("transport", "trainer"), [("disk", "native"), ("broadcast", "megatron")])
def test_weights_reach_a_run_s_server_on_other_ways_than_http(
    cli: Cli, server: ServerProcess, transport: str, trainer: str
) -> None:
    small = ("--num-rollout", "2", "--rollout-batch-size", "4", "--skip-eval-before-train")
    mode = ("--update-weight-transfer-mode", transport, "--check-weight-update-equal")
    done = cli(*TRAIN, *small, *mode, "--train-backend", trainer, *ATTACHED, server.url)
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    assert summary_of(run)["steps"] == 2
    assert len({e["checksums"]["engine-0"] for e in RunReader(run).events("weights_compared")}) == 3


def test_a_server_with_a_tokenizer_ends_responses_with_a_stop_string(
    warm_checkpoint: Path, spec: ArchSpec, tmp_path: Path
) -> None:
    """With the arguments that a run with `--rollout-stop` gives it: this vocabulary has no symbols for the
    sentence that a server warms up with."""
    reading = {"skip_tokenizer_init": False, "skip_server_warmup": True}
    tokenizer = CheckpointTokenizer(warm_checkpoint)
    with serving(warm_checkpoint, tmp_path / "server.log", reading) as server:
        engine = SglangEngine(HttpClient(server.url), spec, SglangSettings(max_context_len=CONTEXT))
        sampling = SamplingParams(max_new_tokens=24, stop=("7", "89"))
        prompts = [tokenizer.encode(f"sort {digits}=") for digits in ("52913", "87654", "8978", "31")]
        asked = [
            GenerateRequest(input_ids=prompt, sampling=sampling, sample_key=i, group=i)
            for i, prompt in enumerate(prompts)
        ]

        async def scenario() -> list[GenerateOutput]:
            await engine.receive_weights(read_hf(warm_checkpoint), version=1)
            await probe(engine, version=1, stop=sampling.stop)
            return await engine.generate(asked)

        outputs = settle(scenario())
    assert any(output.stop_string for output in outputs)
    for output in outputs:
        lengths = range(1, len(output.output_ids) + 1)
        *before, last = (tokenizer.decode(output.output_ids[:length]) for length in lengths)
        assert not any(string in text for text in before for string in sampling.stop)
        assert (output.stop_string or "") in last and (output.stop_string is None) == (len(before) == 23)
