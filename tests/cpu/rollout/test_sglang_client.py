"""The SGLang client against the contract: what is sent, what is read, and what is refused."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.arch import ArchSpec
from miles.arch.precision import NumberFormat, precision_policy
from miles.arch.spec import DenseMlpSpec
from miles.errors import ConfigError, RunError, Unavailable
from miles.http_client import ConnectionLost, HttpClient
from miles.planning.facts.checkpoint import read_checkpoint
from miles.rollout.engine import GenerateRequest, RequestRefused, SamplingParams
from miles.rollout.sglang import server as server_module
from miles.rollout.sglang.command import ServerOptions, argument_words, command_line
from miles.rollout.sglang.contract import BrokenContract
from miles.rollout.sglang.control import UpdateFailed
from miles.rollout.sglang.engine import SglangEngine, SglangSettings
from miles.rollout.sglang.probe import probe
from miles.rollout.sglang.server import free_ports
from miles.rollout.sglang.weight_payload import Announced, buckets, encode
from miles.weights.low_precision import as_stored
from tests.cpu.rollout.fake_sglang import FakeSglang

WEIGHTS = [("model.embed_tokens.weight", torch.ones(4, 2)), ("model.norm.weight", torch.zeros(2))]


@pytest.fixture
def spec() -> ArchSpec:
    found = read_checkpoint("builtin:sort")[0].spec
    assert found is not None
    return found


def settle(scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario, 300)

    asyncio.run(bounded())


def with_server(
    spec: ArchSpec,
    scenario: Callable[[FakeSglang, SglangEngine], Awaitable[None]],
    sessions: bool = False,
    settings: SglangSettings = SglangSettings(max_context_len=16),  # noqa: B008
    hooks: bool = False,
) -> None:
    async def run() -> None:
        async with FakeSglang(sessions=sessions, hooks=hooks).running() as server:
            await scenario(server, SglangEngine(HttpClient(server.url), spec, settings))

    settle(run())


def request(*ids: int, group: int | None = 0, new: int = 3, stop: tuple[int, ...] = ()) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=new, stop_token_ids=stop)
    return GenerateRequest(input_ids=ids, sampling=sampling, sample_key=5, group=group)


def test_an_answer_becomes_the_fields_of_a_sample(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=4)
        first, second = await engine.generate([request(1, 2, 3), request(1, 2, 3, stop=(7,))])
        assert first.output_ids == [7, 7, 7] and first.finish_reason == "length"
        assert second.output_ids == [7] and second.finish_reason == "stop"
        assert first.log_probs.dtype == np.float32 and first.log_probs.tolist() == [-0.5] * 3
        assert first.routed_experts is not None and first.routed_experts.dtype == np.int16
        assert first.routed_experts.tolist() == (np.arange(5 * 2 * 2) % 8).reshape(5, 2, 2).tolist()
        assert first.weight_versions == [(4, 0)] and first.cached_tokens == 3
        counters = first.spec_info
        assert counters is not None
        assert (counters.accepted_tokens, counters.draft_tokens, counters.verify_steps) == (5, 8, 4)
        assert counters.tried == [4, 3] and counters.accepted == [3, 2]
        sent = server.calls[-1][1]
        assert sent["return_logprob"] and sent["return_routed_experts"]
        assert sent["sampling_params"][0]["ignore_eos"] and "ignore_eos" not in sent["sampling_params"][1]

    with_server(spec, scenario)


def test_stop_strings_are_the_servers_and_the_one_that_matched_is_told(spec: ArchSpec) -> None:
    """Unless the last token is a stop id: then that ended the response, whatever it says."""

    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=1)
        server.matched = "END"
        stop = ("END", "\n")
        sampling = SamplingParams(max_new_tokens=3, stop=stop)
        by_text, by_id, free = await engine.generate(
            [
                replace(request(1), sampling=sampling),
                replace(request(1), sampling=replace(sampling, stop_token_ids=(7,))),
                request(1),
            ]
        )
        assert (by_text.finish_reason, by_text.stop_string) == ("stop", "END")
        assert (by_id.finish_reason, by_id.stop_string) == ("stop", None)
        assert free.stop_string is None
        sent = server.calls[-1][1]["sampling_params"]
        assert [params.get("stop") for params in sent] == [["END", "\n"], ["END", "\n"], None]
        assert all(params["no_stop_trim"] for params in sent)

    with_server(spec, scenario)


def test_a_server_that_takes_no_stop_strings_is_refused_before_the_first_rollout(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=4)
        await probe(engine, version=4, stop=("END",))
        server.has_tokenizer = False
        await probe(engine, version=4)
        with pytest.raises(Unavailable, match="skip_tokenizer_init"):
            await probe(engine, version=4, stop=("END",))

    with_server(spec, scenario)


def test_only_moe_layers_are_kept_of_the_routes(spec: ArchSpec) -> None:
    layers = (replace(spec.layers[0], mlp=DenseMlpSpec(64)), spec.layers[1])

    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        (output,) = await engine.generate([request(1, new=1)])
        assert output.routed_experts is not None and output.routed_experts.tolist() == [[[2, 3]]]

    with_server(replace(spec, layers=layers), scenario)


def test_weights_travel_in_buckets_and_the_version_with_the_last(spec: ArchSpec) -> None:
    settings = SglangSettings(max_context_len=16, bucket_bytes=32)

    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=2)
        assert server.buckets == [["model.embed_tokens.weight"], ["lm_head.weight"], ["model.norm.weight"]]
        updates = [body for path, body in server.calls if path == "/update_weights_from_tensor"]
        assert [body.get("weight_version") for body in updates] == [None, None, "2"]
        assert [body["flush_cache"] for body in updates] == [False, False, True]
        assert server.paths[0] == "/pause_generation" and server.paths[-1] == "/continue_generation"
        assert engine.health().ok and engine.health().weight_version == 2

    with_server(spec, scenario, settings=settings)


def test_the_head_of_a_tied_model_is_sent_as_a_tensor_of_its_own(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=1)
        tied = engine is not None and spec.tie_word_embeddings
        assert tied and torch.equal(server.received["lm_head.weight"], WEIGHTS[0][1])

    with_server(spec, scenario)


@pytest.mark.parametrize("sessions", [False, True], ids=["to 0.5.20", "from 0.5.22"])
def test_both_contracts_of_a_weight_update_are_spoken(spec: ArchSpec, sessions: bool) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=1)
        assert set(server.received) == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
        assert not server.in_session and not server.paused
        assert ("/end_weight_update" in server.paths) is sessions

    with_server(spec, scenario, sessions)


def packed(spec: ArchSpec) -> list[tuple[str, torch.Tensor]]:
    """One expert's matrix as it travels in INT4, beside a plain tensor."""
    policy = precision_policy(spec, "bf16", NumberFormat("int4"))
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    weights = [(name, torch.randn(320, 96)), ("model.norm.weight", torch.zeros(2))]
    return list(as_stored(weights, policy))


@pytest.mark.parametrize("way", ["tensor", "broadcast", "handles"])
@pytest.mark.parametrize("sessions", [False, True], ids=["patched before 0.5.22", "from 0.5.22"])
def test_packed_weights_are_put_back_before_and_repacked_after(
    spec: ArchSpec, sessions: bool, way: str
) -> None:
    settings = SglangSettings(max_context_len=16, bucket_bytes=6000, repacks=True)
    part = "model.layers.1.mlp.experts.0.down_proj.weight"

    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        if way == "handles":
            in_session = await engine.begin_handles(2)
            await engine.take_handles([encode(packed(spec))], 2, last=True)
            await engine.end_handles(2, in_session)
        elif way == "broadcast":
            await broadcast(engine, packed(spec), 2)
        else:
            await engine.receive_weights(packed(spec), 2)
            received = {name: tensor for name, tensor in server.received.items() if name.startswith(part)}
            assert {name.removeprefix(part): tensor.dtype for name, tensor in received.items()} == {
                "_packed": torch.int32,
                "_scale": torch.bfloat16,
                "_shape": torch.int64,
            }
        steps = [path for path in server.paths if "weight" in path and path != "/model_info"]
        first, *updates, last = steps[1:] if not sessions else steps
        assert set(updates) <= {"/update_weights_from_tensor", "/update_weights_from_distributed"} and updates
        if sessions:
            assert (first, last) == ("/begin_weight_update", "/end_weight_update")
            assert "/post_process_weights" not in server.paths
            return
        assert first == last == "/post_process_weights"
        assert [body for path, body in server.calls if path == first] == [
            {"restore_weights_before_load": True, "post_process_quantization": False},
            {"restore_weights_before_load": False, "post_process_quantization": True},
        ]

    with_server(spec, scenario, sessions, settings, hooks=not sessions)


def test_a_server_that_cannot_undo_its_packing_is_given_nothing(spec: ArchSpec) -> None:
    settings = SglangSettings(max_context_len=16, repacks=True)

    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        with pytest.raises(UpdateFailed, match="cannot be given packed weights again"):
            await engine.receive_weights(packed(spec), version=1)
        assert "/update_weights_from_tensor" not in server.paths

    with_server(spec, scenario, settings=settings)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/update_weights_from_tensor", (400, {"success": False, "message": "shape mismatch"})),
        ("/update_weights_from_tensor", (200, {"success": False, "message": "shape mismatch"})),
        ("/model_info", (200, {"weight_version": "0"})),
    ],
    ids=["refused", "failed", "another version"],
)
def test_an_engine_with_half_an_update_serves_nothing(spec: ArchSpec, path: str, answer: object) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.overrides[path] = answer  # type: ignore[assignment]
        with pytest.raises(UpdateFailed):
            await engine.receive_weights(WEIGHTS, version=1)
        assert server.paused, "it must not decode with weights of two versions"
        with pytest.raises(RunError, match="cannot generate"):
            await engine.generate([request(1)])
        del server.overrides[path]
        await engine.receive_weights(WEIGHTS, version=1)
        assert await engine.generate([request(1)])

    with_server(spec, scenario)


def test_weights_from_disk_carry_their_version(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_checkpoint(Path("/shared/weights-000003"), version=3)
        (body,) = [body for path, body in server.calls if path == "/update_weights_from_disk"]
        assert body["model_path"] == "/shared/weights-000003" and body["weight_version"] == "3"

    with_server(spec, scenario)


async def broadcast(engine: SglangEngine, weights: list[tuple[str, torch.Tensor]], version: int) -> None:
    """All parts of a broadcast; nothing travels."""
    await engine.begin_broadcast(version)
    for bucket, last in buckets(weights, 32):
        await engine.take_broadcast("group", Announced.of(bucket, last), version, 5.0)
    await engine.end_broadcast(version)


def test_a_broadcast_names_what_the_group_brings(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await broadcast(engine, WEIGHTS, 3)
        told = [body for path, body in server.calls if path == "/update_weights_from_distributed"]
        assert len(told) > 1
        assert [name for body in told for name in body["names"]] == [name for name, _ in WEIGHTS]
        assert [shape for body in told for shape in body["shapes"]] == [list(t.shape) for _, t in WEIGHTS]
        assert {dtype for body in told for dtype in body["dtypes"]} == {"float32"}
        assert [body.get("weight_version") for body in told] == [None] * (len(told) - 1) + ["3"]
        assert [body["flush_cache"] for body in told] == [False] * (len(told) - 1) + [True]
        first = server.paths.index("/update_weights_from_distributed")
        assert server.paths.index("/pause_generation") < first
        assert await engine.generate([request(1, 2, 3)])

    with_server(spec, scenario)


def test_requests_wait_over_a_broadcast_that_breaks_off_for_one_that_does_not(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.overrides["/update_weights_from_distributed"] = 400, {"success": False, "message": "no group"}
        with pytest.raises(UpdateFailed, match="refused"):
            await broadcast(engine, WEIGHTS, 4)
        asked = asyncio.create_task(engine.generate([request(1, 2, 3)]))
        server.overrides |= {"/destroy_weights_update_group": (200, {"success": True})}
        await engine.leave_broadcast("group")
        assert not asked.done() and "/generate" not in server.paths
        del server.overrides["/update_weights_from_distributed"]
        await broadcast(engine, WEIGHTS, 5)
        (output,) = await asked
        assert output.weight_versions == [(5, 0)]

    with_server(spec, scenario)


def test_requests_that_wait_for_weights_are_told_when_their_server_is_given_up(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.begin_broadcast(4)
        asked = asyncio.create_task(engine.generate([request(1, 2, 3)]))
        await asyncio.sleep(0)
        engine.retire()
        with pytest.raises(UpdateFailed, match="cannot generate"):
            await asked

    with_server(spec, scenario)


@pytest.mark.parametrize("begun", ["before", "during"])
def test_a_server_that_takes_weights_is_not_unwell(spec: ArchSpec, begun: str) -> None:
    """It is paused meanwhile, and says 503 when it is asked for a token for twenty seconds."""

    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.health = asyncio.Event()
        checking = None if begun == "before" else asyncio.create_task(engine.check())
        while checking is not None and "/health" not in server.paths:
            await asyncio.sleep(0)
        await engine.begin_broadcast(3)
        health = await (checking or engine.check())
        assert not health.ok and "failed half way" in health.reason
        server.health.set()
        server.overrides |= {"/health": (503, b""), "/destroy_weights_update_group": (200, {"success": True})}
        await engine.leave_broadcast("group")
        assert not (await engine.check()).ok, "it stays paused until weights arrive whole"

    with_server(spec, scenario)


def test_a_server_without_its_memory_is_not_asked_for_a_token(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.overrides["/health"] = 503, b""
        await engine.release(["kv_cache"])
        await engine.check()
        await engine.reclaim(["kv_cache"])
        with pytest.raises(ConnectionLost):
            await engine.check()

    with_server(spec, scenario)


def test_a_payload_holds_no_more_than_its_tensor() -> None:
    base = torch.zeros(1000, 1000)
    assert len(encode([("a", base[0])])) < 10_000
    assert [last for _, last in buckets([("a", base), ("b", base)], 1)] == [False, True]


def test_an_abort_reaches_the_groups_that_it_names(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.finish.clear()
        answers = asyncio.create_task(engine.generate([request(1, group=3), request(1, group=3)]))
        await server.generating.wait()
        assert engine.health().running == 2
        assert await engine.abort({4}) == 0
        assert await engine.abort({3}) == 2
        await answers
        rids = next(body["rid"] for path, body in server.calls if path == "/generate")
        named = [body["rid"] for path, body in server.calls if path == "/abort_request"]
        assert sorted(named) == sorted(rids) and len(set(rids)) == 2

    with_server(spec, scenario)


def test_what_a_server_would_refuse_or_clip_is_refused_first(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        for bad in (request(), request(*range(10), new=7), request(55)):
            with pytest.raises(RequestRefused):
                await engine.generate([bad])
        assert server.calls == []
        server.overrides["/generate"] = (400, {"error": {"message": "unknown field `x`"}})
        with pytest.raises(RequestRefused, match="unknown field `x`"):
            await engine.generate([request(1)])

    with_server(spec, scenario)


def test_a_server_that_hangs_up_is_lost(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.hang_up_on.add("/generate")
        with pytest.raises(ConnectionLost):
            await engine.generate([request(1)])

    with_server(spec, scenario)


def test_the_probe_passes_a_server_that_can_do_everything(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=0)
        await probe(engine, version=0, speculative=True)

    with_server(spec, scenario)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("output_token_logprobs", "output_token_logprobs"),
        ("routed_experts", "routed_experts"),
        ("spec_verify_ct", "guesses"),
    ],
)
def test_the_probe_names_what_is_missing(spec: ArchSpec, missing: str, said: str) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=0)
        server.drop_fields.add(missing)
        with pytest.raises(Unavailable, match=said):
            await probe(engine, version=0, speculative=True)

    with_server(spec, scenario)


def test_the_probe_notices_another_version(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=0)
        server.version = "9"
        with pytest.raises(Unavailable, match="weight versions"):
            await probe(engine, version=0)

    with_server(spec, scenario)


def test_routes_of_another_shape_are_refused(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.layers = 3
        with pytest.raises(BrokenContract, match="2 layers"):
            await engine.generate([request(1)])

    with_server(spec, scenario)


def test_gauges_are_summed_over_their_labels(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        assert await engine.measurements() == [{"num_running_reqs": 3.0}]

    with_server(spec, scenario)


def test_the_command_line_says_what_was_asked_for() -> None:
    assert argument_words({"a_b": 1, "on": True, "off": False, "many": ["x", "y"], "none": None}) == [
        *("--a-b", "1", "--on", "--many", "x", "y")
    ]
    python = Path(sys.executable)
    options = ServerOptions(python=python, args={"attention_backend": "triton"}, log=Path("l"))
    words = command_line(options, "127.0.0.1", 4000, 4001)
    assert words[words.index("--attention-backend") + 1] == "triton", "an explicit argument wins"
    assert words[-4:] == ["--host", "127.0.0.1", "--port", "4000"]
    assert words[words.index("--nccl-port") + 1] == "4001"
    on_gpu = command_line(replace(options, on_cpu=False), "127.0.0.1", 4000, 4001)
    assert "sglang.launch_server" in on_gpu and "--device" not in on_gpu


def test_ports_are_free_distinct_and_never_those_of_outgoing_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = free_ports(50)
    assert len(set(found)) == 50 and max(found) < 32768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", found[0]))
        monkeypatch.setattr(server_module, "PORTS", range(found[0], found[0] + 1))
        with pytest.raises(Unavailable, match="no free ports"):
            free_ports(1)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="address"):
        HttpClient("ftp://somewhere")


def test_a_response_goes_on_under_the_new_weights(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        await engine.receive_weights(WEIGHTS, version=1)
        server.cut_after = 2
        server.finish.clear()
        answer = asyncio.create_task(engine.generate([request(1, 2, new=5), request(1, 2, new=5)]))
        await server.generating.wait()
        await engine.receive_weights(WEIGHTS, version=2)
        for output in await answer:
            assert output.output_ids == [7] * 5 and len(output.log_probs) == 5
            assert output.finish_reason == "length"
            assert output.weight_versions == [(1, 0), (2, 2)]
            assert output.routed_experts is not None and output.routed_experts.shape == (6, 2, 2)
            assert output.spec_info is not None and output.spec_info.verify_steps == 8
        first, second = (body for path, body in server.calls if path == "/generate")
        assert second["input_ids"] == [[1, 2, 7, 7]] * 2
        assert [p["max_new_tokens"] for p in second["sampling_params"]] == [3, 3]
        assert not set(first["rid"]) & set(second["rid"])

    with_server(spec, scenario)


def test_what_was_aborted_does_not_go_on(spec: ArchSpec) -> None:
    async def scenario(server: FakeSglang, engine: SglangEngine) -> None:
        server.cut_after = 2
        server.finish.clear()
        answer = asyncio.create_task(engine.generate([request(1, new=5)]))
        await server.generating.wait()
        await engine.abort({0})
        (output,) = await answer
        assert output.finish_reason == "abort" and output.output_ids == [7, 7]

    with_server(spec, scenario)
