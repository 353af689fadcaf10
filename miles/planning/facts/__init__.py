"""What the machine, the checkpoint and the data are, gathered before a run in well under a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles import environment
from miles.config import RunConfig
from miles.data.prompts import PromptKeys
from miles.planning.facts.checkpoint import CheckpointFacts, read_checkpoint, read_load_quantisation
from miles.planning.facts.cluster import ClusterFacts, job_server, read_cluster
from miles.planning.facts.critic import CriticFacts, read_critic_facts
from miles.planning.facts.data import DataFacts, DataRequest, prompt_format, read_data
from miles.planning.facts.draft import DraftFacts, read_draft_facts
from miles.planning.facts.files import MissingPath, missing_paths
from miles.planning.facts.hooks import BrokenHook, broken_hooks
from miles.planning.facts.machine import Gpu, MachineFacts, read_machine
from miles.planning.facts.ports import taken_ports
from miles.planning.facts.quantisation import Quantisation
from miles.planning.facts.server import ServerFacts, read_server
from miles.planning.hardware import CPU, Hardware, detect_kind

__all__ = [
    "CheckpointFacts",
    "ClusterFacts",
    "DataFacts",
    "DraftFacts",
    "Facts",
    "Gpu",
    "MachineFacts",
    "MissingPath",
    "ServerFacts",
    "collect_facts",
]


@dataclass(frozen=True)
class Facts:
    """Everything that a plan is made from, besides the run file."""

    machine: MachineFacts
    checkpoint: CheckpointFacts
    prompts: DataFacts | None
    evals: tuple[DataFacts, ...]
    missing: tuple[MissingPath, ...] = ()
    broken_hooks: tuple[BrokenHook, ...] = ()
    """Other files and directories that the run file names and that are not there."""
    cluster: ClusterFacts | None = None
    """The cluster that the run is to be submitted to."""
    taken_ports: tuple[tuple[str, int], ...] = ()
    """(setting, port) of ports that the run needs and another program has."""
    critic: CriticFacts | None = None
    """The critic's checkpoint that the run file names."""
    draft: DraftFacts | None = None
    """The draft checkpoint that the run file names."""
    server: ServerFacts | None = None
    """The environment that runs SGLang servers, where the run has some; None where there is none."""
    load_quantisation: Quantisation | None = None
    """How the weights of `model.load` are quantised; None for plain numbers."""
    assumed: Hardware | None = None
    """Hardware that the run is planned for in place of this machine's."""

    @property
    def hardware(self) -> Hardware:
        """What the run is planned for: as assumed, else this machine's GPUs."""
        if self.assumed is not None:
            return self.assumed
        gpus = self.machine.gpus
        if not gpus:
            return CPU
        return Hardware(1, len(gpus), detect_kind(gpus[0].name, gpus[0].memory_bytes, gpus[0].sm))

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of the longest sampled training prompt; None where no prompt could be tokenised."""
        return max(self.prompts.prompt_tokens, default=None) if self.prompts else None


def collect_facts(config: RunConfig, in_cluster: bool = False, assume: Hardware | None = None) -> Facts:
    """Look at this machine and at everything the run file names. Writes nothing and loads no weights.

    `in_cluster`: this process is the submitted job, and does not ask the cluster about itself. `assume`:
    hardware to plan for in place of this machine's and of the cluster's. Raises: Unavailable when
    `cluster.address` does not answer.
    """
    cluster = None if in_cluster or assume is not None else _cluster(config)
    checkpoint, tokenizer = read_checkpoint(config.model.hf_checkpoint)
    data = config.data
    rendering = prompt_format(tokenizer, data.apply_chat_template, data.apply_chat_template_kwargs)
    requests = [_eval_request(config, name, path) for name, path in eval_sets(config)]
    prompts = None
    if data.prompt_data is not None:
        keys = PromptKeys(data.input_key, data.label_key, data.metadata_key, data.tool_key)
        columns = (("data.input_key", data.input_key), ("data.label_key", data.label_key))
        prompts = read_data(
            DataRequest("prompts", data.prompt_data, "data.prompt_data", keys, _set(columns), rendering)
        )
    save = config.checkpoint.save or config.run.runs_dir
    return Facts(
        machine=read_machine(Path(save) if save else environment.runs_dir()),
        checkpoint=checkpoint,
        prompts=prompts,
        evals=tuple(read_data(request) for request in requests),
        missing=missing_paths(config),
        broken_hooks=broken_hooks(config),
        cluster=cluster,
        critic=read_critic_facts(config.critic.critic_load, checkpoint.spec),
        draft=read_draft_facts(config.sglang.speculative_draft_model_path, checkpoint.spec),
        taken_ports=() if assume is not None else taken_ports(config),
        server=read_server(config) if config.rollout.backend == "sglang" else None,
        load_quantisation=read_load_quantisation(config.model.load),
        assumed=assume,
    )


def _cluster(config: RunConfig) -> ClusterFacts | None:
    address = config.cluster.address
    if address is None:
        return None
    return read_cluster(job_server(address, config.cluster.ray_dashboard_port))


def eval_sets(config: RunConfig) -> list[tuple[str, str]]:
    """The (name, path) pairs of `eval_prompt_data`; a name without a path is left to preflight."""
    entries = config.eval.eval_prompt_data
    return list(zip(entries[::2], entries[1::2], strict=False))


def _eval_request(config: RunConfig, name: str, path: str) -> DataRequest:
    data, held_out = config.data, config.eval
    input_key, label_key = (
        held_out.eval_input_key or data.input_key,
        held_out.eval_label_key or data.label_key,
    )
    keys = PromptKeys(input_key, label_key, data.metadata_key, held_out.eval_tool_key or data.tool_key)
    columns = (
        ("data.input_key" if input_key == data.input_key else "eval.eval_input_key", input_key),
        ("data.label_key" if label_key == data.label_key else "eval.eval_label_key", label_key),
    )
    return DataRequest(name, path, "eval.eval_prompt_data", keys, _set(columns), None)


def _set(columns: tuple[tuple[str, str | None], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((setting, column) for setting, column in columns if column is not None)
