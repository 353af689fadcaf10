"""What leaves the machine: redacted, whole, and listed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from miles import environment
from miles.diagnosis.bundle import TAIL_BYTES, write_bundle
from miles.diagnosis.redact import HIDDEN, Redactor
from miles.diagnosis.surroundings import surroundings
from miles.errors import RunError
from miles.record import RecordWriter

HF = "hf_" + "aB3" * 11
SECRETS = {
    HF: f"login with {HF} done",
    "ghp_" + "x1Y" * 12: "remote https://x:" + "ghp_" + "x1Y" * 12 + "@github.com/a/b",
    "sk-" + "q9" * 12: "key sk-" + "q9" * 12,
    "AKIA" + "ABCDEFGH12345678": "AKIA" + "ABCDEFGH12345678",
    "hunter2secret": "password=hunter2secret",
    "0123456789abcdef0123": "--wandb-key 0123456789abcdef0123",
    "deadbeefdeadbeef": '{"api_key": "deadbeefdeadbeef", "lr": 1}',
    "s3cr3t-value": "HF_TOKEN: 's3cr3t-value'",
    "abc.def-ghi_123": "Authorization: Bearer abc.def-ghi_123",
    "letmein": "postgres://bob:letmein@db:5432/x",
}


@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_secrets_are_taken_out(secret: str) -> None:
    text = Redactor().text(SECRETS[secret])
    assert secret not in text and HIDDEN in text


@pytest.mark.parametrize(
    "text",
    [
        '"rollout_stop_token_ids": [151643, 151645]',
        "perf/tokens_per_sec 31470.07 max_tokens_per_gpu=16384",
        "the token 151936 is outside the vocabulary",
        "tokenizer: Qwen/Qwen3-30B-A3B",
        "special_tokens_map.json at step-000020",
        '"wandb_key": null, "secret": none',
        "/usr/lib/python3/dist-packages/torch/nn.py:12 in forward",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redactor().text(text) == text


def test_home_directories_and_the_names_in_them_are_taken_out() -> None:
    redactor = Redactor(users=["marie.curie"], homes=["/data/people/mcurie"])
    text = redactor.text(
        "/home/pskl/run /Users/pskl/x /data/people/mcurie/ckpt marie.curie@host pskl said; /root/x"
    )
    assert text == "~/run ~/x ~/ckpt <user>@host <user> said; ~/x"
    assert redactor.text("rank of pskl; upskilled") == "rank of <user>; upskilled", "learned from the path"


def test_ordinary_words_that_are_user_names_somewhere_stay() -> None:
    assert Redactor(users=["root", "ml"]).text("the root of ml") == "the root of ml"


def test_a_bundle_holds_the_record_and_nothing_of_the_samples(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RecordWriter(run) as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.5})
        writer.exception(OSError("cannot read /home/pskl/model"))
        writer.samples(1, [{"prompt": "my private prompt", "response": "x"}])
    (run / "config.json").write_text(json.dumps({"values": {"record": {"wandb_key": "0123456789abcdef"}}}))
    (run / "logs" / "trainer.log").write_text("x" * TAIL_BYTES + f"\nlast line by pskl, {HF}\n")
    target = tmp_path / "b.tar.gz"
    packed = write_bundle(target, run, {"report.md": "seen by pskl\n"}, Redactor(), is_run=True)
    with tarfile.open(target) as archive:
        content = {}
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            content[member.name.removeprefix("b/")] = file.read().decode()
    assert set(content) == {file.name for file in packed} == {
        "config.json", "heartbeat/driver.json", "events/driver.jsonl", "logs/trainer.log", "report.md",
    }  # fmt: skip
    whole = "\n".join(content.values())
    for hidden in ("pskl", "0123456789abcdef", HF, "private"):
        assert hidden not in whole
    assert content["logs/trainer.log"] == f"last line by <user>, {HIDDEN}\n"
    assert next(f for f in packed if f.name == "logs/trainer.log").note == "the last 1 MiB of 1"
    for line in content["events/driver.jsonl"].splitlines():
        json.loads(line)


def test_a_bundle_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="bundle cannot be written"):
        write_bundle(tmp_path / "no" / "b.tar.gz", tmp_path, {}, Redactor(), is_run=False)


def test_the_surroundings_name_versions_and_hide_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HF)
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_DIARY", "private")
    found = surroundings(Redactor())
    assert found["versions"]["torch"] and found["machine"]["cpus"] >= 1
    variables = found["variables"]
    assert (variables["HF_TOKEN"], variables["WANDB_API_KEY"]) == (HIDDEN, HIDDEN)
    assert variables["NCCL_DEBUG"] == "INFO" and "MY_DIARY" not in variables
    assert all(name in environment.reported() for name in variables)
