"""`rsanet nnunet-path`, `rsanet nnunet-plans` and `rsanet nnunet-weights`: RSA in nnU-Net."""

from pathlib import Path
from typing import Annotated

import typer

from rsanet.integrations.nnunet.plans import SCALE, STAGES, write_plans
from rsanet.segment.words import counted

Stages = Annotated[
    list[int] | None,
    typer.Option(
        help="Encoder stages with a block: from 0, full resolution, or from -1, the bottleneck, upwards; "
        f"by default {' '.join(map(str, STAGES))}."
    ),
]


def nnunet_path() -> None:
    """Print the folder of nnU-Net's trainers with RSA: export nnUNet_extTrainer=$(rsanet nnunet-path)."""
    from rsanet.integrations.nnunet import trainers

    typer.echo(Path(trainers.__file__).parent)


def nnunet_plans(
    dataset: Annotated[str, typer.Argument(help="A data set that nnU-Net has planned: its id, name or folder.")],
    plans: Annotated[str, typer.Option(help="Name of its plans.")] = "nnUNetPlans",
    stages: Stages = None,
    scale: Annotated[
        float, typer.Option(help="Factor on the attention's logits; a small one keeps the maps of a short run graded.")
    ] = SCALE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace plans that exist.")] = False,
) -> None:
    """Write nnU-Net plans whose network has RSA blocks, nnUNetPlansRSA, on the same preprocessed data."""
    written = write_plans(dataset, plans, stages or STAGES, scale, overwrite=overwrite)
    for configuration, blocks in written.attended.items():
        typer.echo(f"{configuration}: {counted(len(blocks), 'RSA block')}")
        for block in blocks:
            where = f"encoder stage {block.stage} of 0 to {block.stages - 1}"
            typer.echo(f"  after {where}: {block.channels} channels, {'×'.join(map(str, block.size))} voxels")
    if written.left_out:
        typer.echo(f"left out, not being three-dimensional: {', '.join(written.left_out)}")
    typer.echo(f"The plans are {written.path}.")
    first = next(iter(written.attended))
    typer.echo(f"To train: nnUNetv2_train {written.path.parent.name} {first} 0 -p {written.path.stem}")


def nnunet_weights(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of nnU-Net without RSA, checkpoint_final.pth.")],
    out: Annotated[Path, typer.Argument(help="The file to write, .pth.")],
    stages: Stages = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Add fresh RSA blocks to an nnU-Net checkpoint, for nnUNetv2_train -pretrained_weights."""
    from rsanet.integrations.nnunet.weights import add_rsa_blocks

    chosen = add_rsa_blocks(checkpoint, out, stages or STAGES, overwrite=overwrite)
    typer.echo(f"{out} has the weights and an RSA block after the encoder stages {', '.join(map(str, chosen))}.")
