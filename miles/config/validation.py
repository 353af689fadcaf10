"""Settings that contradict each other, seen from the run file alone.

What needs facts is preflight's to refuse. `validate_*` refuses and never changes anything. A setting that
could have no effect is refused as well: nothing that a user writes is silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from miles.config.derive import BATCH, KNOBS, PROMPTS, resolve_four_knobs
from miles.config.fields import by_dotted
from miles.config.relations import EXCLUSIVE, MERELY_WRITTEN, NEEDS, ORDERED
from miles.config.resolved import ResolvedConfig
from miles.config.toml_text import literal
from miles.errors import MilesError


@dataclass(frozen=True)
class Conflict:
    """Settings that do not go together, and what to do about it."""

    keys: tuple[str, ...]
    what: str
    why: str
    fix: str


Rule = Callable[[ResolvedConfig], Iterator[Conflict]]


def validate(resolved: ResolvedConfig, ignore: Collection[str] = ()) -> list[MilesError]:
    """Every conflict as an error that names the places; conflicts about a key in `ignore` are left out."""
    conflicts = [conflict for rule in RULES for conflict in rule(resolved)]
    return [_as_error(resolved, item) for item in conflicts if not set(item.keys) & set(ignore)]


def _as_error(resolved: ResolvedConfig, conflict: Conflict) -> MilesError:
    written = [str(resolved.origin(dotted)) for dotted in conflict.keys if resolved.is_explicit(dotted)]
    where = ", ".join(dict.fromkeys(written))
    return MilesError(conflict.what, where=where, why=conflict.why, fix=conflict.fix)


def _said(resolved: ResolvedConfig, dotted: str) -> bool:
    """Somebody wrote this down, and it differs from the default."""
    return resolved.is_explicit(dotted) and resolved.value(dotted) != by_dotted()[dotted].default


def _drop(*dotted: str) -> str:
    return "leave one of them out; what a profile sets is undone with " + " or ".join(
        f"`--set {key}=default`" for key in dotted
    )


def validate_four_knobs(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """prompts x samples = batch x steps, or the missing one is a whole number."""
    given = tuple(knob for knob in KNOBS if resolved.is_explicit(knob))
    solved = resolve_four_knobs(resolved)
    if PROMPTS not in given and BATCH not in given:
        return
    prompts, samples, batch, steps = (solved.value(knob) for knob in KNOBS)
    if None not in (prompts, batch, steps) and prompts * samples == batch * steps:
        return
    numbers = ", ".join(f"{knob.partition('.')[2]} = {resolved.value(knob)}" for knob in given)
    why = "rollout_batch_size x n_samples_per_prompt must equal global_batch_size x num_steps_per_rollout"
    if len(given) == 4:
        why += f"; here {prompts} x {samples} = {prompts * samples} and {batch} x {steps} = {batch * steps}"
        fix = "leave one of the four out and it is derived"
    else:
        why += "; with these, the missing one is not a whole number"
        fix = "choose sizes that divide each other"
    yield Conflict(given, f"the batch sizes do not agree: {numbers}", why, fix)


def validate_needs(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """A setting that another switches on is only accepted together with it."""
    for dotted, needs in NEEDS.items():
        needed = (needs,) if isinstance(needs, str) else needs
        if _said(resolved, dotted) and not any(resolved.value(name) for name in needed):
            yield Conflict(
                (dotted, *needed),
                f"{dotted} = {literal(resolved.value(dotted))} has no effect without {' or '.join(needed)}",
                " and ".join(f"{name} is {_shown(resolved.value(name))}" for name in needed),
                f"add {' or '.join(by_dotted()[name].flag for name in needed)}, "
                f"or leave {by_dotted()[dotted].flag} out",
            )


def _shown(value: object) -> str:
    return "not set" if value is None else literal(value)


def validate_exclusive(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """Pairs that cannot both be in force."""
    for left, right, why in EXCLUSIVE:
        if all(_in_force(resolved, dotted) for dotted in (left, right)):
            yield Conflict((left, right), f"{left} and {right} exclude each other", why, _drop(left, right))


def _in_force(resolved: ResolvedConfig, dotted: str) -> bool:
    if dotted in MERELY_WRITTEN:
        return resolved.is_explicit(dotted)
    return bool(resolved.value(dotted))


def validate_order(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """Bounds that are the right way round."""
    for low, high in ORDERED:
        smallest, largest = resolved.value(low), resolved.value(high)
        if smallest is not None and largest is not None and smallest > largest:
            yield Conflict(
                (low, high),
                f"{low} = {literal(smallest)} is above {high} = {literal(largest)}",
                f"{low} may be at most {high}",
                f"lower {low} or raise {high}",
            )


def validate_estimator(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """What each advantage estimator requires."""
    key = "algorithm.advantage_estimator"
    algorithm = resolved.config.algorithm
    if algorithm.advantage_estimator.startswith("reinforce") and not algorithm.normalize_advantages:
        yield Conflict(
            (key, "algorithm.normalize_advantages"),
            f"{algorithm.advantage_estimator} needs normalize_advantages",
            "its returns have no scale of their own: they are whitened over the batch",
            "add --normalize-advantages",
        )
    if algorithm.advantage_estimator == "ppo" and algorithm.custom_advantage_function_path is not None:
        yield Conflict(
            (key, "algorithm.custom_advantage_function_path"),
            "ppo does not take advantages of your own",
            "its critic would have no returns to learn from",
            "leave --advantage-estimator out, or the function",
        )


def validate_custom_loss(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """`custom_loss` and its function come together."""
    algorithm = resolved.config.algorithm
    if (algorithm.loss_type == "custom_loss") != (algorithm.custom_loss_function_path is not None):
        yield Conflict(
            ("algorithm.loss_type", "algorithm.custom_loss_function_path"),
            'loss_type = "custom_loss" and custom_loss_function_path come together',
            "one of them is missing",
            "add --loss-type custom_loss --custom-loss-function-path PATH, or leave both out",
        )


def validate_reward_server(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """`remote_rm` and its address come together."""
    reward = resolved.config.reward
    if (reward.rm_type == "remote_rm") != (reward.rm_url is not None):
        yield Conflict(
            ("reward.rm_type", "reward.rm_url"),
            'rm_type = "remote_rm" and rm_url come together',
            "one of them is missing",
            "add --rm-type remote_rm --rm-url URL, or leave both out",
        )


def validate_teacher(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """A distillation has one kind of teacher, in the trainer's process or served."""
    given, backend = resolved.config.distillation, resolved.config.training.backend
    load, urls, kind = "opd_teacher_load", "opd_teacher_urls", given.opd_type
    if not given.use_opd:
        return
    if (given.opd_teacher_load is None) == (not given.opd_teacher_urls):
        yield Conflict(
            ("distillation.use_opd", f"distillation.{load}", f"distillation.{urls}"),
            "use_opd needs one teacher: opd_teacher_load or opd_teacher_urls",
            "neither is set" if given.opd_teacher_load is None else "both are set",
            "add --opd-teacher-load CHECKPOINT, or --opd-teacher-urls http://host:port",
        )
    elif given.opd_teacher_urls and resolved.config.rollout.rollout_temperature != 1.0:
        yield Conflict(
            (f"distillation.{urls}", "rollout.rollout_temperature"),
            "a served teacher needs rollout_temperature = 1",
            "its log-probs are those of temperature 1, and the student's are those of the rollout",
            "leave --rollout-temperature out, or use --opd-teacher-load",
        )
    elif kind is not None and kind != ("sglang" if given.opd_teacher_urls else backend):
        yield Conflict(
            ("distillation.opd_type", f"distillation.{urls if given.opd_teacher_urls else load}"),
            f'opd_type = "{kind}" does not fit the teacher',
            "a checkpoint is a teacher of the trainer's kind (native, megatron), an address one of sglang",
            "leave --opd-type out",
        )


def validate_truncation(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """Truncation has no lower bound."""
    low = "correction.tis_clip_low"
    if resolved.config.correction.tis_mode == "truncate" and resolved.value(low) > 0:
        yield Conflict(
            ("correction.tis_mode", low),
            f'tis_mode = "truncate" with {low} = {literal(resolved.value(low))}',
            "truncation cuts weights above tis_clip and leaves the others as they are",
            "write --tis-mode clip, or leave --tis-clip-low out",
        )


def validate_dtype(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """`dtype` and Megatron's switches agree."""
    dtype = resolved.config.model.dtype
    for switch in ("bf16", "fp16"):
        if getattr(resolved.config.precision, switch) and dtype not in (None, switch):
            yield Conflict(
                (f"precision.{switch}", "model.dtype"),
                f'precision.{switch} contradicts dtype = "{dtype}"',
                "both name the type of the weights",
                _drop(f"precision.{switch}", "model.dtype"),
            )


def validate_recompute(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """Full recompute says which layers."""
    training = resolved.config.training
    if training.recompute_granularity == "full" and training.recompute_method is None:
        yield Conflict(
            ("training.recompute_granularity", "training.recompute_method"),
            "full recompute needs recompute_method",
            "it does not say which layers are recomputed",
            "add --recompute-method uniform --recompute-num-layers 1",
        )
    if training.recompute_granularity == "full" and training.recompute_modules is not None:
        yield Conflict(
            ("training.recompute_granularity", "training.recompute_modules"),
            "full recompute runs whole layers again, recompute_modules names parts of them",
            "the parts belong to selective recompute",
            "write --recompute-granularity selective, or drop --recompute-modules",
        )


def validate_eval_sets(resolved: ResolvedConfig) -> Iterator[Conflict]:
    """Evaluation sets are pairs of a name and a file, each name once."""
    key = "eval.eval_prompt_data"
    words = resolved.config.eval.eval_prompt_data
    names = words[::2]
    if len(words) % 2 or len(set(names)) < len(names):
        yield Conflict(
            (key,),
            f"{key} = {literal(words)} is not a list of name, file, name, file, ...",
            "each evaluation set has a name of its own and a file",
            "write --eval-prompt-data heldout heldout.jsonl",
        )


RULES: tuple[Rule, ...] = (
    validate_four_knobs,
    validate_needs,
    validate_exclusive,
    validate_order,
    validate_estimator,
    validate_custom_loss,
    validate_reward_server,
    validate_teacher,
    validate_truncation,
    validate_dtype,
    validate_recompute,
    validate_eval_sets,
)
