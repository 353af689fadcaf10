"""Launch lines of slime and miles parse and map as they are written."""

from __future__ import annotations

import pytest

from miles.config import RunConfig, find_key, parse_flags, resolve

LINES = {
    "grpo": (
        "--advantage-estimator grpo --model-name qwen3-30b-a3b --hf-checkpoint DIR --rollout-batch-size 512"
        " --n-samples-per-prompt 8",
        {
            "algorithm.advantage_estimator": "grpo",
            "model.model_name": "qwen3-30b-a3b",
            "model.hf_checkpoint": "DIR",
            "rollout.rollout_batch_size": 512,
            "rollout.n_samples_per_prompt": 8,
            "training.global_batch_size": 4096,
        },
    ),
    "placement": (
        "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --rollout-num-gpus 8 "
        "--rollout-num-gpus-per-engine 2 --colocate",
        {
            "cluster.actor_num_nodes": 1,
            "cluster.actor_num_gpus_per_node": 8,
            "cluster.rollout_num_gpus": 8,
            "cluster.rollout_num_gpus_per_engine": 2,
            "cluster.colocate": True,
        },
    ),
    "parallel": (
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --expert-model-parallel-size 4",
        {
            "parallel.tensor_model_parallel_size": 8,
            "parallel.pipeline_model_parallel_size": 2,
            "parallel.expert_model_parallel_size": 4,
        },
    ),
    "data": (
        "--prompt-data FILE.jsonl --num-rollout 3000",
        {"data.prompt_data": "FILE.jsonl", "rollout.num_rollout": 3000},
    ),
    "speculative engine": (
        "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 "
        "--sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 4 "
        "--sglang-speculative-draft-model-path DIR --sglang-enable-draft-weights-cpu-backup",
        {
            "sglang.speculative_algorithm": "EAGLE",
            "sglang.speculative_num_steps": 3,
            "sglang.speculative_eagle_topk": 1,
            "sglang.speculative_num_draft_tokens": 4,
            "sglang.speculative_draft_model_path": "DIR",
            "sglang.enable_draft_weights_cpu_backup": True,
        },
    ),
    "draft training": (
        "--mtp-num-layers 1 --enable-mtp-training --mtp-loss-scaling-factor 0.2",
        {
            "speculative.mtp_num_layers": 1,
            "speculative.enable_mtp_training": True,
            "speculative.mtp_loss_scaling_factor": 0.2,
        },
    ),
    "correction": (
        "--use-tis --tis-threshold 0.9 --lr 5e-7",
        {"correction.use_tis": True, "correction.tis_threshold": 0.9, "optimizer.lr": 5e-7},
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_launch_line_maps_to_its_keys(name: str) -> None:
    line, expected = LINES[name]
    resolved = resolve(flags=parse_flags(line.split()))
    assert {dotted: resolved.value(dotted) for dotted in expected} == expected
    assert RunConfig.model_validate(resolved.config.model_dump()) == resolved.config


def test_all_launch_lines_together_are_one_run() -> None:
    line = " ".join(words for words, _ in LINES.values())
    resolved = resolve(
        "qwen3-moe-fp8", flags=parse_flags(line.split()), sets=["training.num_steps_per_rollout=16"]
    )
    assert resolved.config.training.global_batch_size == 256
    assert resolved.config.sglang.server_args()["speculative_num_steps"] == 3


def test_a_whole_script_of_slime_parses() -> None:
    line = """
        --hf-checkpoint /root/Qwen3-30B-A3B-FP8/ --ref-load /root/Qwen3-30B-A3B_torch_dist/ --load
        /root/ckpt/ --save /root/ckpt/ --save-interval 20 --prompt-data /root/dapo-math-17k.jsonl
        --input-key prompt --label-key label --apply-chat-template --rollout-shuffle --rm-type math
        --num-rollout 200 --rollout-batch-size 16 --n-samples-per-prompt 8 --rollout-max-response-len 8192
        --rollout-temperature 1 --global-batch-size 128 --balance-data --eval-interval 20 --eval-prompt-data
        aime /root/aime-2024.jsonl --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-top-p
        1 --tensor-model-parallel-size 1 --sequence-parallel --pipeline-model-parallel-size 4
        --context-parallel-size 1 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        --use-dynamic-batch-size --max-tokens-per-gpu 20480 --moe-enable-deepep --moe-token-dispatcher-type
        flex --transformer-impl transformer_engine --bf16 --fp8-format e4m3 --fp8-recipe blockwise
        --no-gradient-accumulation-fusion --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl
        --entropy-coef 0.00 --eps-clip 0.2 --eps-clip-high 0.28 --use-tis --optimizer adam --lr 1e-6
        --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
        --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer
        --rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.6 --sglang-expert-parallel-size 8
        --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
        --attention-softmax-in-fp32 --attention-backend flash --actor-num-nodes 2 --actor-num-gpus-per-node
        8 --colocate
    """
    config = resolve(flags=parse_flags(line.split())).config
    assert config.training.num_steps_per_rollout == 1
    assert config.model.dtype == "bf16"
    assert config.eval.eval_prompt_data == ("aime", "/root/aime-2024.jsonl")


def test_every_key_of_the_speculative_lines_is_also_an_sglang_argument() -> None:
    from miles.config.sglang_table import server_args

    typed = [item.dotted for item in parse_flags(LINES["speculative engine"][0].split())]
    assert {dotted.removeprefix("sglang.") for dotted in typed} <= server_args().keys()
    assert all(find_key(dotted) for dotted in typed)
