"""Which source wins, and how each value knows where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config import OriginKind, parse_flags, resolve
from miles.errors import ConfigError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_are_the_weakest_source() -> None:
    resolved = resolve()
    assert resolved.config.optimizer.lr == 1e-6
    assert str(resolved.origin("optimizer.lr")) == "default"
    assert not resolved.is_explicit("optimizer.lr")


def test_each_source_wins_over_the_ones_before_it(tmp_path: Path) -> None:
    write(tmp_path, "left.toml", "[optimizer]\nlr = 1.0\nmin_lr = 0.1\nweight_decay = 0.1\nadam_eps = 0.1\n")
    write(
        tmp_path,
        "right.toml",
        "[optimizer]\nmin_lr = 0.2\nweight_decay = 0.2\nadam_eps = 0.2\nclip_grad = 0.2\n",
    )
    profile = write(
        tmp_path,
        "profile.toml",
        'extends = ["./left.toml", "./right.toml"]\n'
        "[optimizer]\nweight_decay = 0.3\nadam_eps = 0.3\nclip_grad = 0.3\n",
    )
    run_file = write(tmp_path, "run.toml", "[optimizer]\nadam_eps = 0.4\nclip_grad = 0.4\n")
    flags = parse_flags(["--clip-grad", "0.5", "--lr-warmup-iters", "5"])
    resolved = resolve(profile, Path(run_file), flags, ["optimizer.lr_warmup_iters=6"])

    optimizer = resolved.config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay) == (1.0, 0.2, 0.3)
    assert (optimizer.adam_eps, optimizer.clip_grad, optimizer.lr_warmup_iters) == (0.4, 0.5, 6)
    assert str(resolved.origin("optimizer.lr")) == f"{tmp_path}/left.toml:2"
    assert str(resolved.origin("optimizer.min_lr")) == f"{tmp_path}/right.toml:2"
    assert str(resolved.origin("optimizer.weight_decay")) == f"{profile}:3"
    assert str(resolved.origin("optimizer.adam_eps")) == f"{run_file}:2"
    assert resolved.origin("optimizer.adam_eps").kind is OriginKind.RUN_FILE
    assert str(resolved.origin("optimizer.clip_grad")) == "--clip-grad"
    assert str(resolved.origin("optimizer.lr_warmup_iters")) == "--set optimizer.lr_warmup_iters"


def test_a_layer_that_two_profiles_share_is_applied_once(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[optimizer]\nlr = 1.0\n")
    write(tmp_path, "left.toml", 'extends = ["./base.toml"]\n[optimizer]\nlr = 2.0\n')
    write(tmp_path, "right.toml", 'extends = ["./base.toml"]\n')
    profile = write(tmp_path, "profile.toml", 'extends = ["./left.toml", "./right.toml"]\n')
    assert resolve(profile).config.optimizer.lr == 2.0


def test_extends_is_relative_to_the_file_that_says_it_and_may_name_a_shipped_profile(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    write(tmp_path, "layers/inner.toml", "[optimizer]\nlr = 3.0\n")
    write(tmp_path, "layers/outer.toml", 'extends = "./inner.toml"\n')
    profile = write(tmp_path, "profile.toml", 'extends = ["base/grpo", "layers/outer.toml"]\n')
    resolved = resolve(profile)
    assert resolved.config.optimizer.lr == 3.0
    assert str(resolved.origin("algorithm.eps_clip_high")).startswith("profiles/base/grpo.toml:")


def test_set_default_undoes_what_a_profile_says() -> None:
    assert resolve("quickstart").config.rollout.num_rollout == 80
    resolved = resolve("quickstart", sets=["rollout.num_rollout=default", "rollout.num_epoch=2"])
    assert resolved.config.rollout.num_rollout is None
    assert not resolved.is_explicit("rollout.num_rollout")


def test_set_reads_toml_literals_and_plain_words() -> None:
    sets = [
        "optimizer.lr=4e-4",
        "cluster.colocate=true",
        'rollout.rollout_stop=["a", "b"]',
        "data.prompt_data=a b.jsonl",
    ]
    config = resolve(sets=sets).config
    assert config.optimizer.lr == 4e-4
    assert config.cluster.colocate is True
    assert config.rollout.rollout_stop == ("a", "b")
    assert config.data.prompt_data == "a b.jsonl"


def test_an_integer_is_a_number_but_text_is_not(tmp_path: Path) -> None:
    profile = write(tmp_path, "profile.toml", "[optimizer]\nlr = 1e-4\nclip_grad = 1\n")
    assert resolve(profile).config.optimizer.clip_grad == 1.0
    with pytest.raises(ConfigError, match=r'lr must be a number; it is "1e-4", a string'):
        resolve(write(tmp_path, "text.toml", '[optimizer]\nlr = "1e-4"\n'))


def test_sglang_arguments_keep_their_names_and_values(tmp_path: Path) -> None:
    profile = write(tmp_path, "profile.toml", "[sglang]\nmem_fraction_static = 0.6\ntp_size = 8\n")
    resolved = resolve(
        profile,
        flags=parse_flags(["--sglang-speculative-num-steps=3", "--sglang-speculative-algorithm=EAGLE"]),
    )
    assert resolved.config.sglang.server_args() == {
        "mem_fraction_static": 0.6,
        "tp_size": 8,
        "speculative_num_steps": 3,
        "speculative_algorithm": "EAGLE",
    }
    assert str(resolved.origin("sglang.tp_size")) == f"{profile}:3"


def test_nothing_changes_a_resolved_configuration() -> None:
    config = resolve("quickstart").config
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer = config.optimizer  # type: ignore[misc]
