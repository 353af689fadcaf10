"""Every preflight rule fires on the run it is about and stays quiet on its neighbour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import pytest

from miles.arch import ArchSpec, DenseMlpSpec, published_tensors, with_mtp
from miles.arch.spec import IndexerSpec
from miles.arch.specs import shipped_spec
from miles.config import ResolvedConfig, parse_flags, resolve
from miles.planning import Facts, Severity, collect_facts, preflight
from miles.planning.facts.cluster import ClusterFacts
from miles.planning.facts.compiler import CompilerFacts
from miles.planning.facts.critic import CriticFacts
from miles.planning.facts.data import DataFacts
from miles.planning.facts.draft import DraftFacts
from miles.planning.facts.files import MissingPath
from miles.planning.facts.hooks import BrokenHook
from miles.planning.facts.machine import Gpu
from miles.planning.facts.quantisation import Quantisation
from miles.planning.facts.server import ServerFacts
from miles.planning.hardware import parse_hardware
from miles.planning.rules import REGISTRY

Change = Callable[[Facts], Facts]
Make = Callable[..., ResolvedConfig]


@dataclass(frozen=True)
class Case:
    """A change of the good run: more flags, flags left out, other facts."""

    flags: str = ""
    without: str = ""
    facts: Change = lambda facts: facts


def checkpoint(**changes: Any) -> Change:
    return lambda facts: replace(facts, checkpoint=replace(facts.checkpoint, **changes))


def arch(**changes: Any) -> Change:
    def change(facts: Facts) -> Facts:
        assert facts.checkpoint.spec is not None
        return checkpoint(spec=replace(facts.checkpoint.spec, **changes))(facts)

    return change


def layers_of_two_kinds(facts: Facts) -> Facts:
    assert facts.checkpoint.spec is not None
    first, *others = facts.checkpoint.spec.layers
    odd = replace(first, attention=replace(first.attention, qkv_bias=not first.attention.qkv_bias))
    return arch(layers=(odd, *others))(facts)


def prompts(**changes: Any) -> Change:
    def change(facts: Facts) -> Facts:
        assert facts.prompts is not None
        return replace(facts, prompts=replace(facts.prompts, **changes))

    return change


def machine(**changes: Any) -> Change:
    return lambda facts: replace(facts, machine=replace(facts.machine, **changes))


def critic(problem: str) -> Change:
    return lambda facts: replace(facts, critic=CriticFacts("/models/critic", problem))


def shell(**variables: str) -> Change:
    return machine(environment=tuple(variables.items()))


def cluster(cpus: float, ray_version: str = "") -> Change:
    there = ClusterFacts("http://head:8265", ray_version or version("ray"), 1, cpus, 0.0)
    return lambda facts: replace(facts, cluster=there)


def served(version: str | None) -> Change:
    server = ServerFacts("/envs/sglang/bin/python", version)
    return lambda facts: replace(facts, server=server)


def held_out(**changes: Any) -> Change:
    missing = DataFacts("math", "test.jsonl", "eval.eval_prompt_data", (), exists=True, num_rows=10)
    return lambda facts: replace(facts, evals=(replace(missing, **changes),))


def dense(facts: Facts) -> Facts:
    spec = facts.checkpoint.spec
    assert spec is not None
    return arch(layers=tuple(replace(layer, mlp=DenseMlpSpec(64)) for layer in spec.layers))(facts)


def stacked(facts: Facts) -> Facts:
    return checkpoint(spec=shipped_spec("llama-4-scout-17b-16e"))(facts)


def indexed(facts: Facts) -> Facts:
    spec = facts.checkpoint.spec
    assert spec is not None
    attention = replace(spec.layers[0].attention, indexer=IndexerSpec(num_heads=2, head_dim=8, top_k=4))
    return arch(layers=tuple(replace(layer, attention=attention) for layer in spec.layers))(facts)


OWN_MTP = "--mtp-num-layers 1 --enable-mtp-training"
SCALED = """\
--train-backend megatron --rollout-backend sglang --executor ray --dtype bf16 --lr 1e-6 --save-interval 20
--colocate --actor-num-nodes 2 --actor-num-gpus-per-node 8 --rollout-num-gpus-per-engine 8
--tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 8
--expert-tensor-parallel-size 1 --rollout-max-context-len 10240 --use-dynamic-batch-size
--max-tokens-per-gpu 20480 --use-distributed-optimizer --accumulate-allreduce-grads-in-fp32
--recompute-granularity full --recompute-method uniform --recompute-num-layers 1
--sglang-mem-fraction-static 0.6"""
"""The good run on two nodes of 8 GPUs, with Megatron and SGLang."""


def both(first: Change, second: Change) -> Change:
    return lambda facts: second(first(facts))


def model(name: str) -> Change:
    return checkpoint(spec=shipped_spec(name), tokenizer_size=151_669)


def on(hardware: str, name: str = "qwen3-30b-a3b", then: Change = lambda facts: facts) -> Change:
    """The good run planned for GPUs that are not here, with a published model."""
    assume: Change = lambda facts: replace(facts, assumed=parse_hardware(hardware))  # noqa: E731
    return both(both(model(name), assume), then)


H100 = Gpu("NVIDIA H100 80GB HBM3", 79 * 1024**3, 90)


def node(gpu: Gpu = H100, name: str = "qwen3-30b-a3b", **changes: Any) -> Change:
    """The good run on this machine, which has 8 GPUs."""
    room = {"memory_bytes": 2048 * 1024**3, "disk_free_bytes": 10**14, "gpus": (gpu,) * 8}
    return both(model(name), machine(**(room | changes)))


def scaled(flags: str = "", facts: Change | None = None, without: str = "") -> Case:
    """A change of the good run on GPUs; a flag given twice counts as the last one says."""
    return Case(f"{SCALED} {flags}", without, facts or on("16xH100"))


def quantised(**changes: Any) -> Change:
    usual = Quantisation("fp8", "fp8", block_size=(128, 128), scales="fp32")
    return checkpoint(quantisation=replace(usual, **changes))


KEPT = "model.layers.3.self_attn.q_proj.weight"


def all_but_one() -> Change:
    """An FP8 checkpoint of every projection but `KEPT`."""
    names = {n for n in published_tensors(shipped_spec("qwen3-30b-a3b")) if n.endswith("_proj.weight")}
    return quantised(quantised=frozenset(names - {KEPT}), low_precision_layers=frozenset(range(48)))


ONE_NODE = "--actor-num-nodes 1 --rollout-batch-size 32"
FP8 = "--fp8-format e4m3 --fp8-recipe blockwise --rollout-format fp8 --sglang-expert-parallel-size 8"
INT4 = "--int4-qat --rollout-format int4"
BLOCKWISE = "--fp8-format e4m3 --fp8-recipe blockwise --rollout-format fp8"
NVFP4 = "--fp4-format e2m1 --fp4-recipe nvfp4 --rollout-format nvfp4"

MIB = 1024**2

CASES: dict[str, tuple[Case, Case]] = {
    # rule: (a run it fires on, a run near it that it does not mind)
    "CAP1": (Case("--log-passrate"), Case("--qkv-format thd")),
    "CAP2": (scaled("--attention-dropout 0.1"), scaled("--attention-dropout 0.0")),
    "CAP3": (Case("--train-backend megatron"), Case("--train-backend native --executor inline")),
    "CAP4": (scaled(FP8, on("16xA100")), scaled(FP8, on("16xH100"))),
    "CAP5": (
        Case("--rollout-format nvfp4", facts=checkpoint(has_mtp_weights=True)),
        Case("--rollout-format fp32"),
    ),
    "CAP6": (Case("--dtype fp16"), Case("--dtype bf16")),
    "MOD1": (Case(facts=checkpoint(state="missing", spec=None)), Case(facts=checkpoint(state="builtin"))),
    "MOD2": (
        Case(facts=checkpoint(spec=None, spec_problem="config.json: not JSON")),
        Case(facts=checkpoint(state="missing", spec=None)),
    ),
    "MOD3": (Case(facts=checkpoint(weights_problem="the file is truncated")), Case()),
    "MOD4": (Case(facts=checkpoint(shapes_problem="missing (1): lm_head.weight")), Case()),
    "MOD5": (Case(facts=checkpoint(tokenizer_problem="no tokenizer.json")), Case()),
    "MOD6": (Case(facts=checkpoint(tokenizer_size=56)), Case(facts=checkpoint(tokenizer_size=54))),
    "MOD7": (
        Case("--model-name qwen3-30b-a3b"),
        Case("--model-name no-such-model"),
    ),
    "MOD8": (Case("--model-name qwen3-30b"), Case("--model-name qwen3-30b-a3b")),
    "STP1": (
        Case(facts=arch(eos_token_ids=())),
        Case("--rollout-stop-token-ids 2", facts=arch(eos_token_ids=())),
    ),
    "MTP1": (
        Case("--mtp-num-layers 1 --enable-mtp-training"),
        Case("--mtp-num-layers 1 --enable-mtp-training", facts=checkpoint(has_mtp_weights=True)),
    ),
    "STP2": (
        Case("--apply-chat-template", facts=checkpoint(turn_end=(54, "<|im_end|>"))),
        Case(
            "--apply-chat-template --rollout-stop-token-ids 54",
            facts=checkpoint(turn_end=(54, "<|im_end|>")),
        ),
    ),
    "STP3": (Case("--rollout-stop END ''"), Case("--rollout-stop END")),
    "STP4": (Case(r"--rollout-stop END '\n'"), Case(r"--rollout-stop '\nabla' 'x\n'")),
    "DAT1": (Case(facts=prompts(exists=False, problem="no such prompt file")), Case()),
    "DAT2": (Case(facts=prompts(problem="line 1: not JSON")), Case(facts=prompts(exists=False))),
    "DAT3": (
        Case(facts=prompts(keys=frozenset({"input", "label"}))),
        Case(facts=prompts(keys=frozenset({"input", "answer", "extra"}))),
    ),
    "DAT4": (
        Case(facts=prompts(bad_rows=((3, "not JSON"),))),
        Case("--on-bad-row refuse", facts=prompts(bad_rows=((3, "not JSON"),))),
    ),
    "DAT5": (
        Case("--on-bad-row refuse", facts=prompts(bad_rows=((3, "not JSON"),))),
        Case("--on-bad-row refuse"),
    ),
    "DAT6": (Case(facts=prompts(num_rows=31)), Case(facts=prompts(num_rows=32))),
    "DAT7": (
        Case("--apply-chat-template", facts=checkpoint(has_chat_template=False)),
        Case("--apply-chat-template"),
    ),
    "DAT8": (
        Case(facts=prompts(has_messages=True)),
        Case("--apply-chat-template", facts=prompts(has_messages=True)),
    ),
    "FIL1": (
        Case(facts=lambda facts: replace(facts, missing=(MissingPath("model.load", "/x", "a directory"),))),
        Case(),
    ),
    "VER4": (
        Case("--use-wandb", facts=machine(packages=())),
        Case("--use-wandb --use-tensorboard", facts=machine(packages=(("wandb", "0.22.0"),))),
    ),
    "FIL2": (
        Case(facts=lambda facts: replace(facts, broken_hooks=(BrokenHook("reward.custom_rm_path", "x"),))),
        Case(),
    ),
    "CTX1": (
        # 40 prompt tokens and 217 response tokens are one more than the model's 256 positions.
        Case("--rollout-max-response-len 217"),
        Case("--rollout-max-response-len 216"),
    ),
    "CTX2": (Case(without="--rollout-max-response-len"), Case()),
    "CTX3": (Case("--rollout-max-context-len 103"), Case("--rollout-max-context-len 104")),
    "CTX4": (Case("--rollout-max-prompt-len 39"), Case("--rollout-max-prompt-len 40")),
    "CTX5": (Case("--rollout-max-prompt-len 19"), Case("--rollout-max-prompt-len 20")),
    "REW1": (Case(without="--rm-type"), Case("--loss-type sft_loss", without="--rm-type")),
    "REW2": (Case(without="--label-key"), Case("--custom-rm-path my.reward", without="--label-key")),
    "REW3": (
        Case("--custom-rm-path rewards/mine", without="--rm-type"),
        Case("--custom-rm-path rewards.mine.score", without="--rm-type"),
    ),
    "REW4": (Case("--custom-rm-path my.reward"), Case("--custom-rm-path my.reward", without="--rm-type")),
    "REW5": (
        Case(facts=prompts(unlabelled=3)),
        Case("--custom-rm-path my.reward", without="--rm-type", facts=prompts(unlabelled=3)),
    ),
    "REW6": (
        Case(facts=prompts(solutions=64)),
        Case("--rm-type math", facts=prompts(solutions=64)),
    ),
    "BAT1": (
        Case(without="--rollout-batch-size --n-samples-per-prompt"),
        Case(),
    ),
    "BAT2": (
        Case("--rollout-batch-size 6 --n-samples-per-prompt 4 --num-steps-per-rollout 4"),
        Case("--n-samples-per-prompt 4 --num-steps-per-rollout 8"),
    ),
    "GRP1": (
        Case(without="--n-samples-per-prompt"),
        Case("--disable-rewards-normalization", without="--n-samples-per-prompt"),
    ),
    "GRP2": (Case("--n-samples-per-prompt 2"), Case("--n-samples-per-prompt 4")),
    "RUN1": (Case(without="--num-rollout"), Case("--num-epoch 1", without="--num-rollout")),
    "RUN2": (
        Case("--num-epoch 1", without="--num-rollout", facts=prompts(num_rows=31)),
        Case("--num-epoch 2", without="--num-rollout", facts=prompts(num_rows=31)),
    ),
    "LRN1": (Case("--lr 3e-3"), Case("--lr 1e-3")),
    "LRN2": (Case("--lr-warmup-iters 100"), Case("--lr-warmup-iters 99")),
    "LRN3": (Case("--lr 0"), Case()),
    "ALN1": (Case("--use-rollout-routing-replay", facts=dense), Case("--use-rollout-routing-replay")),
    "ALN2": (
        Case("--no-use-rollout-routing-replay"),
        Case("--no-use-rollout-routing-replay", facts=dense),
    ),
    "CRT2": (
        Case("--advantage-estimator ppo", facts=critic("missing (1): model.norm.weight")),
        Case("--advantage-estimator ppo", facts=critic("")),
    ),
    "CRT1": (
        Case("--advantage-estimator ppo --num-critic-only-steps 100"),
        Case("--advantage-estimator ppo --num-critic-only-steps 99"),
    ),
    "SET1": (Case("--eval-interval 5"), Case("--eval-interval 5 --eval-prompt-data math test.jsonl")),
    "KLD1": (Case("--use-kl-loss"), Case("--use-kl-loss --kl-loss-coef 0.01")),
    "DBG1": (
        Case("--inject-fault stale_engine@5 --executor ray"),
        Case("--inject-fault stale_engine@5 --executor inline"),
    ),
    "MEM1": (Case(facts=machine(memory_bytes=30 * MIB)), Case(facts=machine(memory_bytes=400 * MIB))),
    "MEM8": (
        Case("--sglang-max-total-tokens 99 --rollout-max-context-len 100"),
        Case("--sglang-max-total-tokens 100 --rollout-max-context-len 100"),
    ),
    "MEM9": (
        Case("--sglang-max-total-tokens 500 --rollout-max-context-len 100"),
        Case("--sglang-max-total-tokens 25600 --rollout-max-context-len 100"),
    ),
    "MEM2": (
        Case(facts=machine(memory_available_bytes=20 * MIB)),
        Case(facts=machine(memory_available_bytes=400 * MIB)),
    ),
    "DSK1": (
        # One checkpoint is 226,112 × 12 B = 2.6 MiB; a hundred of them are not kept when only two are.
        Case("--save-interval 1", facts=machine(disk_free_bytes=100 * MIB)),
        Case("--save-interval 1 --keep-checkpoints 2", facts=machine(disk_free_bytes=100 * MIB)),
    ),
    "THR1": (Case("--threads 2"), Case("--threads 1")),
    "THR2": (Case(facts=shell(OMP_NUM_THREADS="5")), Case(facts=shell(OMP_NUM_THREADS="4"))),
    "RAY1": (
        # Driver 1 + trainer 1 + engines 6 + reward worker 1 = 9.
        Case("--address http://head:8265 --num-engines 6", facts=cluster(cpus=8)),
        Case("--address http://head:8265 --num-engines 6", facts=cluster(cpus=9)),
    ),
    "RAY2": (Case("--num-engines 9"), Case("--num-engines 9 --address http://head:8265")),
    "RAY3": (
        Case("--executor inline --address http://head:8265"),
        Case("--executor ray --address http://head:8265"),
    ),
    "RAY4": (
        Case("--address http://head:8265", facts=cluster(cpus=8, ray_version="2.1.0")),
        Case("--address http://head:8265", facts=cluster(cpus=8)),
    ),
    "ENV1": (
        Case("--threads 1", facts=shell(OMP_NUM_THREADS="2")),
        Case("--threads 2", facts=shell(OMP_NUM_THREADS="2")),
    ),
    "ENV2": (
        Case("--fp8-block-scale fp32", facts=shell(NVTE_FP8_BLOCK_SCALING_FP32_SCALES="0")),
        Case("--fp8-block-scale fp32", facts=shell(NVTE_FP8_BLOCK_SCALING_FP32_SCALES="1")),
    ),
    "ENV3": (
        Case("--tensor-model-parallel-size 2", facts=shell(CUDA_DEVICE_MAX_CONNECTIONS="8")),
        Case("--tensor-model-parallel-size 2", facts=shell(CUDA_DEVICE_MAX_CONNECTIONS="1")),
    ),
    "ENV4": (
        scaled(ONE_NODE, both(node(), shell(CUDA_VISIBLE_DEVICES="0,1,2,3"))),
        scaled(ONE_NODE, both(node(), shell(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"))),
    ),
    "ENV5": (
        scaled(ONE_NODE, both(node(), shell(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"))),
        scaled(
            f"{ONE_NODE} --no-colocate --rollout-num-gpus 8",
            both(node(), shell(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")),
        ),
    ),
    "ENV6": (
        scaled("""--train-env-vars '{"CUDA_DEVICE_MAX_CONNECTIONS":"8"}'"""),
        scaled("""--train-env-vars '{"CUDA_DEVICE_MAX_CONNECTIONS":"1"}'"""),
    ),
    "SHM1": (
        Case("--executor ray", facts=machine(shared_memory_bytes=64 * MIB)),
        Case("--executor inline", facts=machine(shared_memory_bytes=64 * MIB)),
    ),
    "ULM1": (
        Case("--executor ray", facts=machine(open_files=1024)),
        Case("--executor ray", facts=machine(open_files=65536)),
    ),
    "PRT1": (
        Case(facts=lambda facts: replace(facts, taken_ports=(("record.prometheus_port", 9090),))),
        Case(),
    ),
    "FTL1": (
        scaled("--use-fault-tolerance"),
        scaled("--use-fault-tolerance --rollout-health-check-first-wait 300"),
    ),
    "VER1": (
        Case("--executor ray", facts=machine(packages=(("torch", "2.13.0"), ("ray", "3.0.0")))),
        Case("--executor ray", facts=machine(packages=(("torch", "2.13.0"), ("ray", "2.60.0")))),
    ),
    "VER2": (
        scaled(facts=node(packages=(("sglang", "0.5.20"), ("torch", "2.14.1")))),
        scaled(facts=node(packages=(("sglang", "0.5.20"), ("torch", "2.13.0")))),
    ),
    "VER3": (
        scaled(facts=node(packages=(("transformer-engine", "2.17.0"),))),
        scaled(
            facts=node(packages=(("transformer-engine", "2.17.0"), ("transformer-engine-cu13", "2.17.0")))
        ),
    ),
    "LAY1": (
        scaled("--expert-model-parallel-size 32"),
        scaled("--expert-model-parallel-size 16"),
    ),
    "LAY2": (
        scaled("--tensor-model-parallel-size 16", on("16xH100", "qwen3-14b")),
        scaled(
            "--tensor-model-parallel-size 8 --expert-model-parallel-size 1 --rollout-num-gpus-per-engine 4",
            on("16xH100", "qwen3-14b"),
        ),
    ),
    "LAY3": (
        scaled("--pipeline-model-parallel-size 4", on("16xH100", "qwen3-235b-a22b")),
        scaled(
            "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 23 "
            "--decoder-last-pipeline-num-layers 23 --expert-model-parallel-size 4",
            on("16xH100", "qwen3-235b-a22b"),
        ),
    ),
    "LAY4": (
        scaled("--expert-model-parallel-size 2", on("16xH100", "qwen3-14b")),
        scaled("--expert-model-parallel-size 2"),
    ),
    "LAY5": (
        scaled("--no-sequence-parallel"),
        scaled("--no-sequence-parallel --tensor-model-parallel-size 1"),
    ),
    "LAY6": (
        scaled("--expert-model-parallel-size 1"),
        scaled("--expert-model-parallel-size 1 --expert-tensor-parallel-size 4"),
    ),
    "LAY7": (
        scaled("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 12"),
        scaled(
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 6 "
            "--expert-model-parallel-size 4"
        ),
    ),
    "LAY8": (
        scaled("--actor-num-nodes 4 --actor-num-gpus-per-node 4 --tensor-model-parallel-size 8"),
        scaled("--actor-num-nodes 4 --actor-num-gpus-per-node 4 --tensor-model-parallel-size 4"),
    ),
    "LAY9": (scaled("--padded-vocab-size 151937"), scaled("--padded-vocab-size 151940")),
    "LAY10": (
        scaled("--context-parallel-size 2 --attention-backend unfused"),
        scaled("--context-parallel-size 2 --attention-backend fused"),
    ),
    "LAY11": (
        scaled("--moe-enable-deepep"),
        scaled("--moe-enable-deepep --moe-token-dispatcher-type flex"),
    ),
    "LAY12": (
        scaled(
            "--pipeline-model-parallel-size 2 --expert-model-parallel-size 4 "
            "--moe-token-dispatcher-type allgather"
        ),
        scaled("--moe-token-dispatcher-type allgather"),
    ),
    "LAY13": (
        # 3 prompts of 2 samples are 6 samples over DP 4.
        scaled("--rollout-batch-size 3 --n-samples-per-prompt 2"),
        scaled("--rollout-batch-size 4 --n-samples-per-prompt 2"),
    ),
    "LAY14": (
        Case("--train-backend megatron --actor-num-gpus-per-node 0", facts=layers_of_two_kinds),
        Case("--train-backend megatron --actor-num-gpus-per-node 0"),
    ),
    "GPU1": (scaled(facts=on("8xH100")), scaled(facts=on("24xH100"))),
    "GPU2": (
        scaled("--no-colocate --rollout-num-gpus 12", on("32xH100")),
        scaled("--no-colocate --rollout-num-gpus 16", on("32xH100")),
    ),
    "GPU3": (
        scaled("--no-colocate --rollout-num-gpus 12 --rollout-num-gpus-per-engine 6", on("32xH100")),
        scaled("--no-colocate --rollout-num-gpus 16 --rollout-num-gpus-per-engine 16", on("32xH100")),
    ),
    "GPU4": (scaled("--rollout-num-gpus 8"), scaled("--rollout-num-gpus 16")),
    "GPU5": (scaled("--no-colocate"), scaled("--no-colocate --rollout-num-gpus 8", on("24xH100"))),
    "GPU6": (scaled(facts=on("4x4xGB200")), scaled("--actor-num-nodes 4 --actor-num-gpus-per-node 4")),
    "GPU7": (
        scaled("--sglang-expert-parallel-size 3"),
        scaled("--sglang-expert-parallel-size 8"),
    ),
    "GPU8": (
        scaled(ONE_NODE, node(Gpu("NVIDIA X9", 79 * 1024**3, 90))),
        scaled(ONE_NODE, node(H100)),
    ),
    "MEM3": (scaled("--no-offload-rollout --sglang-mem-fraction-static 0.9"), scaled()),
    "MEM4": (
        scaled("--sglang-mem-fraction-static 0.9"),
        scaled("--sglang-mem-fraction-static 0.8"),
    ),
    "MEM5": (scaled("--sglang-mem-fraction-static 0.05"), scaled("--sglang-mem-fraction-static 0.3")),
    "MEM6": (
        scaled(ONE_NODE, node(memory_bytes=256 * 1024**3)),
        scaled(ONE_NODE, node(memory_bytes=2048 * 1024**3)),
    ),
    "MEM7": (scaled("--max-tokens-per-gpu 8192"), scaled("--max-tokens-per-gpu 10240")),
    "FP1": (
        scaled(f"{FP8} --fp8-block-scale pow2"),
        scaled(f"{FP8} --fp8-block-scale pow2", on("16xH100", then=quantised(scales="pow2"))),
    ),
    "FP6": (
        scaled(FP8, on("16xH100", then=quantised(wrongly_quantised=("model.layers.0.mlp.gate.weight",)))),
        scaled(FP8, on("16xH100", then=quantised())),
    ),
    "FP7": (
        scaled(
            f"{FP8} --num-layers-at-start-in-bf16 2 --first-last-layers-bf16",
            on("16xH100", then=quantised(low_precision_layers=frozenset(range(48)))),
        ),
        scaled(
            f"{FP8} --num-layers-at-start-in-bf16 2 --first-last-layers-bf16",
            on("16xH100", then=quantised(low_precision_layers=frozenset(range(2, 48)))),
        ),
    ),
    "I41": (scaled("--int4-qat"), scaled(INT4)),
    "I42": (
        scaled(INT4, on("16xH100", then=quantised(name="x", method="int4", group_size=128))),
        scaled(
            f"{INT4} --int4-group-size 128",
            on("16xH100", then=quantised(name="x", method="int4", group_size=128)),
        ),
    ),
    "I43": (
        # Experts of 768 columns: 192 over ETP 4, one and a half groups of 128.
        scaled(
            f"{INT4} --expert-tensor-parallel-size 4 --expert-model-parallel-size 2 --int4-group-size 128"
        ),
        scaled(
            f"{INT4} --expert-tensor-parallel-size 2 --expert-model-parallel-size 4 --int4-group-size 128"
        ),
    ),
    "I44": (scaled(INT4, on("16xH100", "qwen3-14b")), scaled(INT4)),
    "I45": (
        scaled(f"{INT4} --sglang-moe-runner-backend triton"),
        scaled(f"{INT4} --sglang-moe-runner-backend marlin"),
    ),
    "I46": (
        scaled(f"{ONE_NODE} {INT4}", both(node(), served("0.5.20"))),
        scaled(f"{ONE_NODE} {INT4}", both(node(), served("0.5.22"))),
    ),
    "NV1": (
        scaled(NVFP4, on("16xB200")),
        scaled(f"{NVFP4} --sglang-expert-parallel-size 8", on("16xB200")),
    ),
    "PRC1": (
        scaled("--fp8-format e4m3 --fp8-recipe blockwise --rollout-format bf16"),
        scaled("--rollout-format fp8 --sglang-expert-parallel-size 8 --use-tis"),
    ),
    "PRC2": (
        scaled("--rollout-format fp8 --sglang-expert-parallel-size 8"),
        scaled("--rollout-format fp8 --sglang-expert-parallel-size 8 --use-tis"),
    ),
    "PRC3": (
        scaled(FP8, on("16xH100", then=quantised(name="x", method="int4", group_size=32))),
        scaled(FP8, on("16xH100", then=quantised())),
    ),
    "PRC4": (
        scaled(FP8, on("16xH100", then=quantised())),
        scaled(f"{FP8} --load /models/plain", on("16xH100", then=quantised())),
    ),
    "PRC5": (
        scaled(FP8, on("16xH100", then=quantised(block_size=(64, 64)))),
        scaled(FP8, on("16xH100", then=quantised(block_size=(128, 128)))),
    ),
    "PRC6": (
        scaled(f"{FP8} --transformer-impl local"),
        scaled(f"{FP8} --transformer-impl transformer_engine"),
    ),
    "PRC7": (
        scaled(f"{FP8} --fp8-param-gather --optimizer-cpu-offload"),
        scaled(f"{FP8} --optimizer-cpu-offload"),
    ),
    "PRC8": (
        # Experts of 768 columns over 8 GPUs: 96, not a multiple of 128.
        scaled(f"{FP8} --sglang-expert-parallel-size 1"),
        scaled(f"{FP8} --sglang-expert-parallel-size 4"),
    ),
    "PRC9": (
        scaled("--fp8-format hybrid --fp8-recipe delayed --first-last-layers-bf16 --rollout-format fp8"),
        scaled("--fp8-format hybrid --fp8-recipe delayed --rollout-format fp8"),
    ),
    "PRC10": (
        scaled(FP8, on("16xH100", then=all_but_one())),
        scaled(f"{FP8} --extra-high-precision-layers-hf {KEPT}", on("16xH100", then=all_but_one())),
    ),
    "PRC11": (
        scaled(FP8, on("16xH100", then=quantised(scales="pow2"))),
        scaled(f"{FP8} --fp8-block-scale pow2", on("16xH100", then=quantised(scales="pow2"))),
    ),
    "PRC16": (scaled(INT4), scaled(FP8, on("16xH100", then=quantised()))),
    "PRC17": (
        scaled(f"{FP8} --extra-high-precision-layers-hf experts."),
        scaled(f"{INT4} --extra-high-precision-layers-hf layers.0.mlp.experts."),
    ),
    "PRC12": (
        # Rows of 64 in the built-in model's hidden size are two groups of 32; of 48 they are not whole.
        Case("--rollout-format mxfp8", facts=arch(hidden_size=48)),
        Case("--rollout-format mxfp8 --use-tis"),
    ),
    "PRC13": (
        Case(f"{BLOCKWISE} --extra-high-precision-layers-hf q_proj"),
        Case(f"{BLOCKWISE} --extra-high-precision-layers-hf q_proj k_proj v_proj"),
    ),
    "PRC14": (Case("--fp8-format e4m3 --rollout-format fp8"), Case(BLOCKWISE)),
    "PRC15": (
        Case(
            "--rollout-format fp8 --use-tis --extra-high-precision-layers-hf experts.gate_up_proj",
            facts=stacked,
        ),
        Case("--rollout-format fp8 --use-tis --extra-high-precision-layers-hf experts.", facts=stacked),
    ),
    "ALN3": (
        scaled("--sglang-enable-return-routed-experts=false"),
        scaled("--sglang-enable-return-routed-experts"),
    ),
    "ALN4": (
        scaled("--rollout-external-engine-addrs http://a:30000"),
        scaled("--rollout-external-engine-addrs http://a:30000", on("16xH100", "qwen3-14b")),
    ),
    "ALN5": (
        scaled("--sglang-speculative-algorithm NGRAM"),
        scaled("--sglang-speculative-algorithm NGRAM --no-use-rollout-routing-replay"),
    ),
    "ALN6": (
        scaled(facts=node(packages=(("sglang", "0.5.6.post2"),))),
        scaled(facts=node(packages=(("sglang", "0.5.10"),))),
    ),
    "ALN7": (
        Case("--true-on-policy-mode --numerics fast"),
        Case("--true-on-policy-mode --numerics exact"),
    ),
    "ALN8": (
        Case("--true-on-policy-mode --rollout-format bf16"),
        Case(f"--true-on-policy-mode {BLOCKWISE}"),
    ),
    "KRN2": (
        Case("--train-kernel fused", facts=machine(compiler=None)),
        Case("--train-kernel fused", facts=machine(compiler=CompilerFacts("/usr/bin/c++", "AVX2"))),
    ),
    "KRN1": (
        Case("--decode-kernel fused", facts=machine(compiler=None)),
        Case("--decode-kernel fused", facts=machine(compiler=CompilerFacts("/usr/bin/c++", "AVX2"))),
    ),
    "SMP1": (Case("--rollout-temperature 0"), Case("--rollout-temperature 0 --loss-type sft_loss")),
    "SMP2": (Case("--rollout-top-p 0.95"), Case("--eval-top-p 0.95 --eval-prompt-data math test.jsonl")),
    "OFF1": (Case("--one-step-ahead"), Case("--one-step-ahead --use-tis")),
    "OFF3": (
        Case("--update-weights-interval 2 --true-on-policy-mode"),
        Case("--update-weights-interval 2"),
    ),
    "OFF4": (
        Case("--fully-async --max-weight-staleness 1 --update-weights-interval 3"),
        Case("--fully-async --max-weight-staleness 2 --update-weights-interval 3"),
    ),
    "OFF5": (
        Case("--fully-async --pause-generation-mode abort"),
        Case("--fully-async --pause-generation-mode in_place"),
    ),
    "OFF2": (
        Case("--partial-rollout"),
        Case("--partial-rollout --mask-offpolicy-in-partial-rollout --over-sampling-batch-size 48"),
    ),
    "LPR1": (Case("--use-rollout-logprobs"), Case()),
    "MOE1": (
        Case("--moe-aux-loss-coeff 0.01"),
        Case("--moe-aux-loss-coeff 0.01 --loss-type sft_loss"),
    ),
    "SPC1": (
        scaled("--sglang-speculative-algorithm EAGLE"),
        scaled("--sglang-speculative-algorithm EAGLE --mtp-num-layers 1 --enable-mtp-training"),
    ),
    "SPC2": (
        scaled("--mtp-num-layers 1 --enable-mtp-training --context-parallel-size 2"),
        scaled("--mtp-num-layers 1 --context-parallel-size 2"),
    ),
    "SPC3": (
        scaled(
            "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 "
            "--sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 6"
        ),
        scaled(
            "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 "
            "--sglang-speculative-eagle-topk 2 --sglang-speculative-num-draft-tokens 6"
        ),
    ),
    "SPC7": (
        scaled("--sglang-speculative-algorithm NGRAM --mtp-num-layers 1 --enable-mtp-training"),
        scaled("--sglang-speculative-algorithm EAGLE --mtp-num-layers 1 --enable-mtp-training"),
    ),
    "SPC8": (
        Case(f"{OWN_MTP} --mtp-training-steps 2", facts=indexed),
        Case(f"{OWN_MTP} --mtp-training-steps 1", facts=indexed),
    ),
    "SPC4": (
        scaled("--sglang-speculative-algorithm EAGLE"),
        scaled("--sglang-speculative-algorithm EAGLE", on("16xH100", then=checkpoint(has_mtp_weights=True))),
    ),
    "SPC5": (
        Case(
            "--sglang-speculative-algorithm NGRAM --sglang-speculative-num-steps 2 "
            "--sglang-speculative-eagle-topk 2 --sglang-speculative-num-draft-tokens 6"
        ),
        Case(
            "--sglang-speculative-algorithm NGRAM --sglang-speculative-num-steps 2 "
            "--sglang-speculative-eagle-topk 2 --sglang-speculative-num-draft-tokens 5"
        ),
    ),
    "SPC6": (
        scaled(
            "--sglang-speculative-algorithm EAGLE --sglang-speculative-draft-model-path d",
            on("16xH100", then=lambda f: replace(f, draft=DraftFacts("d", "eagle3"))),
        ),
        scaled(
            "--sglang-speculative-algorithm EAGLE3 --sglang-speculative-draft-model-path d",
            on("16xH100", then=lambda f: replace(f, draft=DraftFacts("d", "eagle3"))),
        ),
    ),
    "SRV1": (
        Case("--rollout-backend sglang"),
        Case("--rollout-backend sglang", facts=served("0.5.20")),
    ),
    "SRV2": (
        Case("--rollout-backend sglang --sglang-host 0.0.0.0", facts=served("0.5.20")),
        Case("--rollout-backend sglang --sglang-attention-backend triton", facts=served("0.5.20")),
    ),
    "SRV6": (
        Case("--rollout-backend sglang --sglang-skip-tokenizer-init --rollout-stop END"),
        Case("--rollout-backend sglang --rollout-stop END"),
    ),
    "SRV5": (
        scaled(f"{FP8} --update-weight-transfer-mode disk"),
        Case("--rollout-backend sglang --update-weight-delta --update-weight-transfer-mode tensor"),
    ),
    "SRV4": (
        Case(
            "--rollout-backend sglang --actor-num-gpus-per-node 0 --update-weight-transfer-mode broadcast "
            "--rollout-external-engine-addrs http://10.0.0.2:30000"
        ),
        Case(
            "--rollout-backend sglang --actor-num-gpus-per-node 0 --update-weight-transfer-mode broadcast "
            "--rollout-external-engine-addrs http://127.0.0.1:30000"
        ),
    ),
    "SRV3": (
        Case(
            "--rollout-backend sglang --actor-num-gpus-per-node 0 --sglang-speculative-algorithm EAGLE "
            "--sglang-speculative-eagle-topk 2 --mtp-num-layers 1 --enable-mtp-training",
            facts=served("0.5.20"),
        ),
        Case(
            "--rollout-backend sglang --actor-num-gpus-per-node 0 --sglang-speculative-algorithm EAGLE "
            "--mtp-num-layers 1 --enable-mtp-training",
            facts=served("0.5.20"),
        ),
    ),
    "SRV7": (
        Case("--rollout-backend sglang --actor-num-gpus-per-node 0", facts=indexed),
        Case("--rollout-backend native --actor-num-gpus-per-node 0", facts=indexed),
    ),
    "CKP1": (
        scaled("--load runs/a/checkpoints/step-000020 --start-rollout-id 5"),
        scaled("--load runs/a/checkpoints/step-000020 --start-rollout-id 20"),
    ),
    "CKP2": (Case("--no-save-optim --save-interval 5"), Case("--no-save-optim")),
    "CKP3": (replace(scaled(), flags=SCALED.replace("--save-interval 20", "")), scaled()),
    "CKP4": (scaled("--async-save"), scaled("--async-save --ckpt-format torch_dist")),
    "ASM1": (scaled(facts=on("16xH100")), Case()),
}


def test_every_rule_has_a_firing_and_a_quiet_case() -> None:
    assert CASES.keys() == REGISTRY.keys()


def test_a_good_run_has_no_findings(resolved: Make, facts: Facts) -> None:
    assert preflight(resolved(), facts) == ()


@pytest.mark.parametrize("rule", CASES)
def test_rule_fires(rule: str, resolved: Make, facts: Facts) -> None:
    case, _ = CASES[rule]
    findings = preflight(resolved(case.flags, case.without), case.facts(facts))
    found = next((finding for finding in findings if finding.rule == rule), None)
    assert found is not None, f"only {[finding.rule for finding in findings]}"
    assert found.what and found.cause and found.fix
    assert found.doc == f"docs/reference/preflight.md#{rule.lower()}"


@pytest.mark.parametrize("rule", CASES)
def test_rule_stays_quiet(rule: str, resolved: Make, facts: Facts) -> None:
    _, case = CASES[rule]
    findings = preflight(resolved(case.flags, case.without), case.facts(facts))
    assert rule not in {finding.rule for finding in findings}


def test_a_teacher_stands_for_a_reward_but_judges_no_evaluation(resolved: Make, facts: Facts) -> None:
    def refused(flags: str) -> list[str]:
        findings = preflight(resolved(f"--use-opd --opd-teacher-urls a:1 {flags}", "--rm-type"), facts)
        return [finding.what for finding in findings if finding.rule == "REW1"]

    assert refused("") == []
    assert "no evaluation" in refused("--eval-prompt-data a a.jsonl")[0]


def test_errors_come_before_warnings(resolved: Make, facts: Facts) -> None:
    findings = preflight(resolved("--lr 0 --log-passrate --threads 2"), facts)
    assert [finding.severity for finding in findings] == [
        Severity.ERROR,
        Severity.WARNING,
        Severity.WARNING,
    ]


def test_an_unavailable_part_is_refused_once_and_not_for_each_of_its_settings(
    resolved: Make, facts: Facts
) -> None:
    findings = preflight(resolved("--train-backend megatron --clip-grad 0.5 --use-tis"), facts)
    rules = [finding.rule for finding in findings]
    assert rules.count("CAP3") == 1
    assert not {"CAP1", "CAP2"} & set(rules)


def test_an_explicit_gpu_count_is_refused_even_when_it_is_the_default(resolved: Make, facts: Facts) -> None:
    findings = preflight(resolved("--actor-num-gpus-per-node 8"), facts)
    assert [(finding.rule, finding.setting) for finding in findings] == [
        ("CAP2", "cluster.actor_num_gpus_per_node")
    ]


def test_a_refused_value_names_the_part_that_takes_it(resolved: Make, facts: Facts) -> None:
    findings = preflight(resolved("--rollout-format fp16 --rollout-backend native"), facts)
    (fix,) = [f.fix for f in findings if (f.rule, f.setting) == ("CAP2", "precision.rollout_format")]
    assert fix.endswith("; the sglang engine takes it") and '"fp16"' not in fix


def test_the_mtp_refusal_names_the_convert_command(resolved: Make, facts: Facts) -> None:
    findings = preflight(resolved("--mtp-num-layers 1 --enable-mtp-training"), facts)
    fix = next(finding.fix for finding in findings if finding.rule == "MTP1")
    assert "miles convert /models/small /models/small-mtp --mtp-num-layers 1" in fix


def found_on_gpus(flags: str, rule: str) -> list[tuple[str, str]]:
    run = resolve("gemma-3-12b", flags=parse_flags(flags.split()))
    facts = collect_facts(run.config, assume=parse_hardware("8xH100"))
    return [(f.what, f.fix) for f in preflight(run, facts) if f.rule == rule]


def test_soft_caps_on_gpus_are_sent_to_layers_that_have_them() -> None:
    """LAY14: Transformer Engine has none; Megatron's own layers do."""
    other = "--model-name gemma-2-9b --max-tokens-per-gpu 512"
    ((what, fix),) = found_on_gpus(other, "LAY14")
    assert "soft-capped" in what and fix == "use --transformer-impl local"
    assert not found_on_gpus(f"{other} --transformer-impl local", "LAY14")


def test_windows_in_transformer_engine_are_not_shared_over_ranks() -> None:
    """LAY10: its ring of keys and values takes plain causal attention."""
    ((what, fix),) = found_on_gpus("--context-parallel-size 2", "LAY10")
    assert "windows" in what and fix == "use --context-parallel-size 1"
    assert not found_on_gpus("--context-parallel-size 2 --transformer-impl local", "LAY10")


def test_keys_that_an_indexer_chooses_are_not_shared_over_ranks() -> None:
    """LAY10: it chooses among all keys of a sequence."""
    flags = "--model-name deepseek-v3.2 --context-parallel-size 2"
    for more in ("", "--transformer-impl local"):
        ((what, fix),) = found_on_gpus(f"{flags} {more}", "LAY10")
        assert "an indexer" in what and fix == "use --context-parallel-size 1"
    assert not found_on_gpus("--model-name deepseek-v3.2", "LAY10")
    assert not found_on_gpus("--model-name deepseek-v3 --context-parallel-size 2", "LAY10")


def test_a_builtin_checkpoint_gets_its_mtp_layers_on_request() -> None:
    run = "--sglang-speculative-algorithm EAGLE"

    def found(line: str) -> dict[str, str]:
        resolved = resolve("quickstart", flags=parse_flags(line.split()))
        return {finding.rule: finding.fix for finding in preflight(resolved, collect_facts(resolved.config))}

    assert "--mtp-num-layers 1" in found(run)["SPC4"]
    assert not {"SPC4", "MTP1"} & set(found(f"{run} --mtp-num-layers 1 --enable-mtp-training"))


def test_more_mtp_layers_than_the_checkpoint_has_are_refused(resolved: Make, facts: Facts) -> None:
    assert facts.checkpoint.spec is not None
    one = checkpoint(has_mtp_weights=True, spec=with_mtp(facts.checkpoint.spec, 1))(facts)
    (found,) = [f for f in preflight(resolved("--mtp-num-layers 2"), one) if f.rule == "MTP1"]
    assert "MTP weights of 1 layers" in found.what
    assert "MTP1" not in {finding.rule for finding in preflight(resolved("--mtp-num-layers 1"), one)}


def test_both_sides_of_a_quantised_engine_start_where_they_can(resolved: Make, facts: Facts) -> None:
    """Servers from the quantised checkpoint, the trainer and its reference from plain ones."""

    def found(flags: str, then: Change) -> dict[str, str]:
        run = resolved(f"{SCALED} {flags}", "--lr")
        return {f.rule: f"{f.what}: {f.fix}" for f in preflight(run, on("16xH100", then=then)(facts))}

    plain, int4 = lambda f: f, quantised(name="compressed-tensors", method="int4", group_size=32)
    assert (
        "rollout_format fp8, /models/small holds plain weights: miles convert" in found(FP8, plain)["PRC16"]
    )
    assert "PRC16" not in found(f"{FP8} --rollout-external-engine-addrs http://a:1", plain)
    assert "point --load to the bf16" in found(INT4, int4)["PRC4"]
    assert "point --hf-checkpoint to the bf16" in found("--rollout-format bf16", int4)["PRC4"]
    ready = found(f"{INT4} --load /models/plain", int4)
    assert not {"PRC3", "PRC4", "PRC16", "I42", "CAP1", "CAP2", "CAP5"} & ready.keys()
    with_reference = f"{INT4} --load /models/plain --use-kl-loss --kl-loss-coef 0.1"
    assert "point --ref-load to the bf16" in found(with_reference, int4)["PRC4"]
    assert "PRC4" not in found(f"{with_reference} --ref-load /models/plain", int4)
    loaded = lambda f: replace(int4(f), load_quantisation=int4(f).checkpoint.quantisation)  # noqa: E731
    assert "/models/plain is int4" in found(f"{INT4} --load /models/plain", loaded)["PRC4"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--colocate", "broadcast to servers on the trainer's GPUs"),
        ("--sglang-speculative-algorithm EAGLE --mtp-num-layers 1", "broadcast with EAGLE"),
    ],
)
def test_what_a_broadcast_does_not_reach(words: str, what: str, resolved: Make, facts: Facts) -> None:
    broadcast = "--rollout-backend sglang --update-weight-transfer-mode broadcast"
    run = resolved(f"{SCALED.replace('--colocate', '')} {broadcast} {words}", "--lr")
    found = [f.what for f in preflight(run, on("16xH100")(facts)) if f.rule == "SRV4"]
    assert found == [what]


@pytest.mark.parametrize("words", ["--one-step-ahead", "--fully-async", "--update-weights-interval 2"])
def test_a_broadcast_reaches_engines_that_sample_with_older_weights(
    words: str, resolved: Make, facts: Facts
) -> None:
    broadcast = "--rollout-backend sglang --update-weight-transfer-mode broadcast"
    run = resolved(f"{SCALED.replace('--colocate', '')} {broadcast} {words}", "--lr")
    assert "SRV4" not in {f.rule for f in preflight(run, on("16xH100")(facts))}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("", None),
        ("--rollout-external-engine-addrs http://127.0.0.1:1", "for servers that others started"),
        ("--sglang-speculative-algorithm EAGLE --mtp-num-layers 1", "EAGLE"),
    ],
)
def test_what_is_left_out_on_disk_every_server_must_have(
    words: str, what: str | None, resolved: Make, facts: Facts
) -> None:
    on_disk = "--rollout-backend sglang --update-weight-transfer-mode disk --update-weight-delta"
    findings = preflight(resolved(f"{on_disk} {words}"), served("0.5.20")(facts))
    found = [f.what for f in findings if f.rule == "SRV5"]
    assert not found if what is None else len(found) == 1 and what in found[0]


def test_servers_on_the_trainers_gpus_read_no_checkpoint(resolved: Make, facts: Facts) -> None:
    run = resolved(f"{SCALED} --rollout-backend sglang --update-weight-transfer-mode disk", "--lr")
    found = [f.what for f in preflight(run, on("16xH100")(facts)) if f.rule == "SRV5"]
    assert found == ["a checkpoint for servers on the trainer's GPUs"]


def test_int4_experts_are_sent_whole(resolved: Make, facts: Facts) -> None:
    run = resolved(f"{SCALED} {INT4} --update-weight-delta", "--lr")
    found = [f for f in preflight(run, on("16xH100")(facts)) if f.rule == "I45"]
    assert [f.setting for f in found] == ["weight_sync.update_weight_delta"]


def test_large_models_get_a_stricter_learning_rate(resolved: Make, facts: Facts, spec: ArchSpec) -> None:
    large = replace(spec, vocab_size=32_000_000)
    run = resolved("--lr 2e-5 --max-running-requests 1 --rollout-max-context-len 100")
    changed = checkpoint(spec=large, tokenizer_size=55)(facts)
    assert "LRN1" in {finding.rule for finding in preflight(run, changed)}


def test_eval_data_is_checked_like_training_data(resolved: Make, facts: Facts) -> None:
    run = resolved("--eval-prompt-data math test.jsonl")
    findings = preflight(run, held_out(exists=False, problem="no such prompt file")(facts))
    assert [(finding.rule, finding.setting) for finding in findings] == [("DAT1", "eval.eval_prompt_data")]


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ("--gamma 0.9", "algorithm.gamma"),
        ("--gamma 0.9 --advantage-estimator ppo", None),
        ("--rollout-stop END --loss-type sft_loss", "rollout.rollout_stop"),
        ("--rollout-temperature 0.5 --loss-type sft_loss", "rollout.rollout_temperature"),
        ("--rollout-stop END --rollout-temperature 0.5", None),
    ],
)
def test_a_setting_of_a_part_that_the_run_has_not_is_told(
    resolved: Make, facts: Facts, flags: str, setting: str | None
) -> None:
    found = [f.setting for f in preflight(resolved(flags), facts) if f.rule == "SET1"]
    assert found == ([] if setting is None else [setting])
