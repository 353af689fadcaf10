"""Each mistake is one message with place, cause and what to type next; all of a file come in one pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config import parse_flags, resolve
from miles.config.lookup import closest_key
from miles.errors import ConfigError, ExitCode, MilesError


def problems_of(path: Path, text: str) -> tuple[MilesError, ...]:
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        resolve(str(path))
    assert refusal.value.exit_code == ExitCode.USAGE
    return refusal.value.problems


def test_every_mistake_of_a_file_is_reported_with_its_line_and_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    found = problems_of(
        path,
        """\
lr = 3

[optimizer]
lr = "4e-4"                    # a string
lr_warmup_iter = 3             # a typo
adam_beta1 = 1.5               # out of bounds

[rollout]
eps_clip = 0.2                 # right leaf, wrong section
rollout_batch_size = 8.0
rollout_stop = "a"

[algorithm]
advantage_estimator = "grop"

[trainng]
backend = "native"

[sglang]
mem_fraction_statik = 0.6
tp_size = "8"
""",
    )
    assert [
        (problem.where.rpartition(":")[2], problem.what.split(";")[0], problem.fix) for problem in found
    ] == [
        ("1", "unknown key lr", "did you mean optimizer.lr?"),
        ("4", "optimizer.lr must be a number", "write lr = 4e-4, without quotes"),
        ("5", "unknown key optimizer.lr_warmup_iter", "did you mean optimizer.lr_warmup_iters?"),
        ("6", "optimizer.adam_beta1 must be less than 1", ""),
        ("9", "unknown key rollout.eps_clip", "did you mean algorithm.eps_clip?"),
        ("10", "rollout.rollout_batch_size must be an integer", "write rollout_batch_size = 8"),
        ("11", "rollout.rollout_stop must be a list of strings", 'write rollout_stop = ["a"]'),
        (
            "14",
            'algorithm.advantage_estimator must be one of "grpo", "gspo", "cispo", "rloo", "ppo", '
            '"reinforce_plus_plus", "reinforce_plus_plus_baseline"',
            'did you mean "grpo"?',
        ),
        ("16", "unknown section [trainng]", "did you mean [training]?"),
        ("20", "unknown key sglang.mem_fraction_statik", "did you mean sglang.mem_fraction_static?"),
        ("21", "sglang.tp_size must be an integer", "write tp_size = 8, without quotes"),
    ]
    assert all(problem.where.startswith(f"{path}:") for problem in found)


def test_mistakes_of_all_files_and_sets_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[optimizer]\nlrr = 1\n")
    (tmp_path / "profile.toml").write_text('extends = ["./base.toml"]\n[rollout]\nnum_rollout = "3"\n')
    with pytest.raises(ConfigError) as refusal:
        resolve(str(tmp_path / "profile.toml"), sets=["training.bckend=native"])
    assert [problem.where for problem in refusal.value.problems] == [
        f"{tmp_path}/base.toml:2",
        f"{tmp_path}/profile.toml:3",
        "--set training.bckend=native",
    ]


def test_a_conflict_is_reported_beside_the_mistakes_it_has_nothing_to_do_with(tmp_path: Path) -> None:
    text = "[algorithm]\nkl_coef = 0.1\nkl_loss_coef = 0.1\nuse_kl_loss = true\n[optimizer]\nlrr = 1\n"
    assert [problem.what for problem in problems_of(tmp_path / "p.toml", text)] == [
        "unknown key optimizer.lrr",
        "algorithm.kl_coef and algorithm.kl_loss_coef exclude each other",
    ]


def test_a_conflict_that_a_typo_explains_is_not_reported(tmp_path: Path) -> None:
    text = "[algorithm]\nkl_loss_coef = 0.1\nuse_kl_los = true\n"
    assert [problem.what for problem in problems_of(tmp_path / "p.toml", text)] == [
        "unknown key algorithm.use_kl_los"
    ]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("[optimizer\n", ":1:11", "not valid TOML: Expected ']' at the end of a table declaration"),
        ("[optimizer]\nlr = 1\nlr = 2\n", ":3:7", "not valid TOML: Cannot overwrite a value"),
        ("optimizer = 3\n", ":1", "optimizer is a section, not a value"),
        ("[[optimizer]]\nlr = 1\n", ":1", "optimizer is a section, not a value"),
        ("[optimizer.lr]\nx = 1\n", ":1", "optimizer.lr must be a number; it is { x = 1 }"),
        ("extends = 3\n", ":1", "extends must be a list of profile names"),
        ("[cluster]\ncolocate = 1\n", ":2", "cluster.colocate must be true or false; it is 1"),
        ("[optimizer]\nlr = nan\n", ":2", "optimizer.lr must be a finite number; it is nan"),
        ("[rollout]\nnum_rollout = true\n", ":2", "rollout.num_rollout must be an integer; it is true"),
    ],
)
def test_a_malformed_file(tmp_path: Path, text: str, where: str, what: str) -> None:
    (problem,) = problems_of(tmp_path / "p.toml", text)
    assert problem.where == f"{tmp_path}/p.toml{where}"
    assert problem.what == what


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        resolve(str(path))


def test_a_profile_that_extends_itself_is_named_with_its_circle(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text('# comment\nextends = ["./a.toml"]\n')
    (problem,) = problems_of(tmp_path / "a.toml", 'extends = ["./b.toml"]\n')
    assert problem.what == "the profile a extends itself: a -> b -> a"
    assert problem.where == f"{tmp_path}/b.toml:2"
    assert problem.fix == "take one of them out of `extends`"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("eval.rollout_top_p", "rollout.rollout_top_p"),
        ("trainer.backend", "training.backend"),
        ("rollouts.backend", "rollout.backend"),
        ("optimizer.learning_decay_style", "optimizer.lr_decay_style"),
        ("model.rollout_batch_sise", "rollout.rollout_batch_size"),
        ("sglang.tpsize", "sglang.tp_size"),
        ("optimizer.zzzz", None),
    ],
)
def test_the_suggestion_prefers_the_right_leaf_over_the_written_section(
    written: str, meant: str | None
) -> None:
    assert closest_key(written) == meant


def test_a_missing_profile_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve("quikstart")
    (problem,) = refusal.value.problems
    assert (problem.what, problem.fix) == ("no profile is named 'quikstart'", "did you mean quickstart?")


def test_a_missing_file_is_named_with_the_place_that_wanted_it(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "p.toml", '\nextends = ["./gone.toml"]\n')
    assert problem.where == f"{tmp_path}/p.toml:2"
    assert problem.what == f"cannot read {tmp_path}/gone.toml: No such file or directory"
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.toml"):
        resolve(run_file=Path("nowhere.toml"))


CONFLICTS = [
    (
        "--use-kl-loss --kl-coef 0.1 --kl-loss-coef 0.1",
        "algorithm.kl_coef and algorithm.kl_loss_coef exclude",
    ),
    ("--use-tis --use-rollout-logprobs", "correction.use_tis and algorithm.use_rollout_logprobs exclude"),
    (
        "--use-tis --tis-threshold 0.9 --tis-clip 2.0",
        "correction.tis_threshold and correction.tis_clip exclude",
    ),
    (
        "--use-tis --tis-threshold 0.9 --tis-clip-low 0",
        "correction.tis_threshold and correction.tis_clip_low exclude",
    ),
    (
        "--use-tis --tis-threshold 0.9 --tis-mode clip",
        "correction.tis_threshold and correction.tis_mode exclude",
    ),
    (
        "--use-tis --tis-mode truncate --tis-clip-low 0.5",
        'tis_mode = "truncate" with correction.tis_clip_low',
    ),
    ("--tis-level sequence", "has no effect without correction.use_tis or correction.get_mismatch_metrics"),
    ("--use-rs --use-rollout-logprobs", "correction.use_rs and algorithm.use_rollout_logprobs exclude"),
    (
        "--get-mismatch-metrics --use-rollout-logprobs",
        "correction.get_mismatch_metrics and algorithm.use_rollout_logprobs exclude",
    ),
    ("--custom-tis-function-path a.b", 'correction.custom_tis_function_path = "a.b" has no effect without'),
    (
        "--use-tis --custom-tis-function-path a.b --use-rs",
        "correction.custom_tis_function_path and correction.use_rs exclude",
    ),
    ("--use-opd", "use_opd needs one teacher"),
    ("--use-opd --opd-teacher-load a --opd-teacher-urls b:1", "use_opd needs one teacher"),
    ("--use-opd --opd-teacher-load a --opd-type sglang", 'opd_type = "sglang" does not fit the teacher'),
    (
        "--use-opd --opd-teacher-urls a:1 --rollout-temperature 0.7",
        "a served teacher needs rollout_temperature = 1",
    ),
    ("--opd-teacher-load a", "has no effect without distillation.use_opd"),
    ("--rm-type remote_rm", "come together"),
    ("--rm-url http://a:1", "come together"),
    ("--overlong-penalty-factor 2", "has no effect without reward.overlong_buffer_len"),
    (
        "--rollout-max-response-len 8 --overlong-buffer-len 9",
        "reward.overlong_buffer_len = 9 is above rollout.rollout_max_response_len = 8",
    ),
    (
        "--custom-reward-post-process-path a.b --overlong-buffer-len 9",
        "reward.custom_reward_post_process_path and reward.overlong_buffer_len exclude",
    ),
    ("--use-rs --rs-lower-bound 3", "correction.rs_lower_bound = 3.0 is above correction.rs_upper_bound"),
    ("--tis-threshold 0.9", "correction.tis_threshold = 0.9 has no effect without correction.use_tis"),
    (
        "--use-tis --tis-clip 2 --tis-clip-low 3",
        "correction.tis_clip_low = 3.0 is above correction.tis_clip = 2.0",
    ),
    ("--kl-loss-coef 0.1", "algorithm.kl_loss_coef = 0.1 has no effect without algorithm.use_kl_loss"),
    ("--enable-mtp-training", "has no effect without speculative.mtp_num_layers"),
    ("--sglang-speculative-num-steps 3", "has no effect without sglang.speculative_algorithm"),
    ("--use-dynamic-batch-size", "has no effect without training.max_tokens_per_gpu"),
    ("--use-dynamic-batch-size --max-tokens-per-gpu 9 --micro-batch-size 1", "exclude each other"),
    ("--num-rollout 3 --num-epoch 1", "rollout.num_rollout and rollout.num_epoch exclude each other"),
    ("--fully-async --partial-rollout", "rollout.partial_rollout and rollout.fully_async exclude each other"),
    ("--max-weight-staleness 2", "rollout.max_weight_staleness"),
    ("--fully-async --colocate", "cluster.colocate and rollout.fully_async exclude each other"),
    ("--rollout-batch-size 8 --over-sampling-batch-size 4", "is above rollout.over_sampling_batch_size = 4"),
    ("--advantage-estimator reinforce_plus_plus", "reinforce_plus_plus needs normalize_advantages"),
    (
        "--advantage-estimator ppo --custom-advantage-function-path a.py:f",
        "ppo does not take advantages of your own",
    ),
    ("--loss-type custom_loss", "come together"),
    ("--bf16 --dtype fp32", 'precision.bf16 contradicts dtype = "fp32"'),
    ("--fp8-recipe blockwise", "has no effect without precision.fp8_format"),
    ("--recompute-granularity full", "full recompute needs recompute_method"),
    ("--eval-prompt-data a.jsonl", "is not a list of name, file, name, file"),
    ("--eval-prompt-data a x.jsonl a y.jsonl", "is not a list of name, file, name, file"),
]


@pytest.mark.parametrize(("line", "what"), CONFLICTS)
def test_settings_that_contradict_each_other_are_refused(line: str, what: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve(flags=parse_flags(line.split()))
    (problem,) = refusal.value.problems
    assert what in problem.what
    assert problem.where.startswith("--")
    assert problem.why
    assert problem.fix


def test_a_setting_at_its_default_needs_no_switch() -> None:
    resolve(flags=parse_flags(["--kl-loss-coef", "0.0", "--tis-clip", "2.0"]))


def test_thresholds_stay_inside_their_range() -> None:
    for value in ("0", "1.1"):
        with pytest.raises(ConfigError, match="tis_threshold must be"):
            parse_flags(["--use-tis", "--tis-threshold", value])
