"""Suggestions about the model and where it runs."""

from __future__ import annotations

from miles.data.tasks import is_builtin
from miles.planning.capabilities import capabilities
from miles_cli.init.scene import Scene, Suggestion

BUILTIN = "builtin:sort"
QUICKSTART = "quickstart"
LAPTOP = "base/grpo,base/laptop"
CLUSTER = "base/grpo,base/cluster"


def hf_checkpoint(scene: Scene) -> Suggestion | None:
    """The profile's own checkpoint; the built-in model where nothing was asked for."""
    profile = str(scene.given.get("profile", ""))
    if not profile:
        why = "no checkpoint was named, and this one learns on a laptop in under a minute"
        return Suggestion(BUILTIN, why, is_fallback=True)
    recipe = scene.world.recipe(profile)
    if recipe is None or not recipe.is_explicit("model.hf_checkpoint"):
        return None
    return Suggestion(recipe.value("model.hf_checkpoint"), f"from {recipe.origin('model.hf_checkpoint')}")


def profile(scene: Scene) -> Suggestion | None:
    """The recipe made for this model and its prompts; else layers for this machine."""
    prompts = str(scene.given.get("prompt_data", ""))
    if is_builtin(scene.text("hf_checkpoint")) and (not prompts or is_builtin(prompts)):
        return Suggestion(QUICKSTART, "the recipe of the built-in model")
    if not scene.checkpoint:
        return None
    if not _has_accelerators(scene):
        return Suggestion(LAPTOP, f"GRPO in one process on the {scene.machine.cores} cores of this machine")
    name = scene.checkpoint.model_name
    for recipe in scene.world.recipes():
        resolved = scene.world.recipe(recipe)
        if name and resolved and resolved.config.model.model_name == name:
            return Suggestion(recipe, f"the recipe for {name}")
    layer = f"models/{name}"
    if name and scene.world.recipe(layer):
        return Suggestion(f"{CLUSTER},{layer}", f"GRPO under Ray, with the settings of {name}")
    return Suggestion(CLUSTER, "GRPO under Ray on GPUs")


def _has_accelerators(scene: Scene) -> bool:
    """Whether there are GPUs here or behind RAY_ADDRESS, and this version of miles can use them."""
    parts = capabilities().parts
    usable = parts["executor", "ray"].available and parts["trainer", "megatron"].here(on_gpus=True).available
    return usable and bool(scene.machine.gpus or scene.world.ray.address)


def address(scene: Scene) -> Suggestion | None:
    """The job server of the cluster that the environment names."""
    if job_server := scene.world.ray.job_server:
        return Suggestion(job_server, f"RAY_ADDRESS of the shell is {scene.world.ray.address}")
    return Suggestion("", "RAY_ADDRESS is not set, so Ray is started on this machine")


def actor_num_nodes(scene: Scene) -> Suggestion | None:
    """The profile's nodes; else this machine alone."""
    return scene.from_profile("cluster.actor_num_nodes") or Suggestion(1, "this machine alone")


def actor_num_gpus_per_node(scene: Scene) -> Suggestion | None:
    """The profile's GPUs; else those of this machine."""
    known = scene.from_profile("cluster.actor_num_gpus_per_node")
    if known or not scene.machine.gpus:
        return known or Suggestion(8, "the usual node; this machine has no GPU to count")
    return Suggestion(len(scene.machine.gpus), f"this machine has {len(scene.machine.gpus)} GPUs")
