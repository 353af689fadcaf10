"""The words of `miles convert`, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FORMATS, EXCEPTIONS, FILES = "Formats", "Exceptions", "Run"


def _complete_format(incomplete: str) -> list[str]:
    from miles_cli.convert_options import MEGATRON, TARGETS

    return [name for name in (*TARGETS, *MEGATRON) if name.startswith(incomplete)]


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="Directory of a checkpoint: Hugging Face (plain, FP8, MXFP8, NVFP4, INT4, INT8), torch DCP, "
        "a step of a run's checkpoints, or Megatron's torch_dist.",
    ),
]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="Directory to make; it must not exist yet.")]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="FORMAT",
        help="bf16, fp16, fp32 · fp8 (blocks of 128x128), fp8_channel, fp8_tensor, mxfp8, nvfp4, int4, "
        "int8 · dcp (torch's distributed checkpoint), native (a step of a run), torch_dist (Megatron's, "
        "bit for bit). Left out: as it is.",
        autocompletion=_complete_format,
        rich_help_panel=FORMATS,
    ),
]
ForRun = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="RUN",
        help="The format and the exceptions of a profile, a run file or a run.",
        rich_help_panel=FORMATS,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="INT4: weights that share a scale; 32.", rich_help_panel=FORMATS),
]
Asymmetric = Annotated[
    bool, typer.Option("--asymmetric", help="INT4: with zero points.", rich_help_panel=FORMATS)
]
Fp8BlockScale = Annotated[
    str | None,
    typer.Option(
        metavar="fp32|pow2",
        help="FP8 in blocks: scales for Hopper (fp32, the default), or powers of two for Blackwell.",
        rich_help_panel=FORMATS,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="bf16|fp16|fp32",
        help="Of the tensors that a quantised format leaves alone, and of all in dcp; default: theirs.",
        rich_help_panel=FORMATS,
    ),
]
LayersAtStart = Annotated[
    int,
    typer.Option(
        "--num-layers-at-start-in-bf16",
        metavar="N",
        min=0,
        show_default=False,
        help="First layers that are not quantised.",
        rich_help_panel=EXCEPTIONS,
    ),
]
LayersAtEnd = Annotated[
    int,
    typer.Option(
        "--num-layers-at-end-in-bf16",
        metavar="N",
        min=0,
        show_default=False,
        help="Last layers that are not quantised.",
        rich_help_panel=EXCEPTIONS,
    ),
]
Kept = Annotated[
    list[str] | None,
    typer.Option(
        "--extra-high-precision-layers-hf",
        metavar="NAME",
        help="A name, or a part of names, that is not quantised; may be given again.",
        rich_help_panel=EXCEPTIONS,
    ),
]
MtpNumLayers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="MTP layers that the target has; those the source lacks are random.",
        rich_help_panel="MTP layers",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Of random MTP layers; 0.", rich_help_panel="MTP layers")
]
Origin = Annotated[
    Path | None,
    typer.Option(
        "--origin-hf-dir",
        metavar="DIR",
        help="Where config.json and the tokenizer are, if not in SOURCE.",
        rich_help_panel=FILES,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Largest file, as 5GB or 800MB; 5GB.", rich_help_panel=FILES),
]
NoSaveOptim = Annotated[
    bool,
    typer.Option(
        "--no-save-optim",
        help="dcp: leave out the optimizer's state of a step of a run.",
        rich_help_panel=FILES,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Weights at work at a time; one for each core.", rich_help_panel=FILES
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        help="Do not read back what was written: no errors in the manifest.",
        rich_help_panel=FILES,
    ),
]
CheckLogits = Annotated[
    bool,
    typer.Option(
        "--check-logits",
        help="Run both models on random tokens and compare their predictions; needs memory for one.",
        rich_help_panel=FILES,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=FILES),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=FILES)]
