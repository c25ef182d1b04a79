"""One call: attack a classifier and its gate, corrupt its images, and say what it all means.

Protocol: the images are drawn at random; each attack of the preset gets what the attack before
left standing, at each epsilon what was left at the smaller one. Final images are re-scored by the
deployed forward pass. A robust accuracy is an upper bound: a stronger attack may find more.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_guard.attacks import Examples
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate import Guard
from ebm_guard.gate.deciding import Parts
from ebm_guard.model import EnergyClassifier
from ebm_guard.robustness import side_stages, summary
from ebm_guard.robustness.corruptions import corruption_facts
from ebm_guard.robustness.gate_attacks import Source, score_has_gradient
from ebm_guard.robustness.gated import GateChain, attack_gate, attack_ood
from ebm_guard.robustness.label_flips import Chain, Context, attack_epsilon, sharpen
from ebm_guard.robustness.masking import random_forward
from ebm_guard.robustness.masking_probes import CLOSED, forward_problem
from ebm_guard.robustness.masking_stage import flags_of
from ebm_guard.robustness.options import CORRUPTION_SETS, AttackOptions, Images
from ebm_guard.robustness.plan import Plan, Scope, make_plan, pilot
from ebm_guard.robustness.presets import Attacker, preset_of, without_gradients
from ebm_guard.robustness.records import EpsilonResult, NormResult, OodResult, Robustness
from ebm_guard.robustness.runner import Runner, Store, measure_speed
from ebm_guard.robustness.subject import Subject
from ebm_guard.robustness.threat import Threat, default_threats

_EOT, _DRAWS = 20, 11


def evaluate_robustness(
    model: Guard | EnergyClassifier | Callable[..., Any],
    images: Images | Tensor,
    labels: Tensor | None = None,
    *,
    gate: Parts | None = None,
    no_gate: str = "",
    ood: Mapping[str, Tensor] | None = None,
    id_scores: NDArray[np.float64] | None = None,
    options: AttackOptions | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Robustness:
    """Attack a classifier, with its gate in the loop where it has one.

    Args:
        model: a guard (its gate is in the loop once it is fitted), a wrapped classifier, or a
            model with a ``pretrained_cfg``.
        images: pixels in [0, 1] at the model's input size, or :class:`Images`.
        labels: (N,) int64 true classes, where ``images`` is a tensor.
        gate: what decides, for a classifier without a guard.
        no_gate: why there is none, for the report.
        ood: OOD images (M, C, H, W) in [0, 1] by name, for aim D.
        id_scores: the gate's score of clean ID images, for AUROC under aim D; default: of the
            attacked images as they are.
        options: see :class:`AttackOptions`.
        on_plan: called with the plan before the attacks run.
        say: called with a line for each stage.

    Returns:
        The whole evaluation; ``to_dict()`` gives JSON types.

    Raises:
        InvalidInputError: pixels outside [0, 1], labels that do not fit, bad options.
        UnsupportedModelError: the model returns probabilities, or its head is needed and not found.

    Example:
        >>> from ebm_guard.data.demo import demo_classifier, load_demo
        >>> demo = load_demo("evaluation")
        >>> pixels = torch.from_numpy(demo.images[:, None]).float() / 255
        >>> found = evaluate_robustness(
        ...     EnergyClassifier(demo_classifier()), pixels, torch.from_numpy(demo.labels),
        ...     options=AttackOptions(images=16, threats=(Threat.of("linf", ["0.3"]),)))
        >>> found.norms[0].at("0.3").worst_case.value <= found.clean.value
        True
    """
    options = options or AttackOptions()
    started = time.perf_counter()
    classifier, parts = _resolved(model, gate)
    subject = Subject(classifier, parts, batch_size=options.batch_size)
    given = images if isinstance(images, Images) else Images(images, labels)
    foreign = {name: _foreign_pixels(name, pixels) for name, pixels in (ood or {}).items()}
    checked = _checked(given)
    with subject.untouched(options.seed):
        subject.check(checked.pixels)
        examples, label_source = _labelled(subject, checked, known=given.labels is not None)
        examples = _shuffled(examples, options.seed)
        few = examples.select(slice(0, 8))
        noisy = random_forward(subject.forward, few)
        closed = forward_problem(subject.forward, few).startswith(CLOSED)
        if noisy:
            subject = subject.with_draws(_DRAWS)
        context, plan = _prepared(
            subject,
            examples,
            options,
            foreign,
            _EOT if noisy else 1,
            started,
            say,
            closed=closed,
        )
        if on_plan is not None:
            on_plan(plan)
        return _evaluated(
            context,
            plan,
            options,
            pool=examples,
            of=given.of or len(examples),
            label_source=label_source,
            no_gate=no_gate,
            ood=foreign,
            id_scores=id_scores,
            noisy=noisy,
            started=started,
        )


def _resolved(model: Any, gate: Parts | None) -> tuple[EnergyClassifier, Parts | None]:
    """Return the classifier and what decides."""
    if not isinstance(model, Guard):
        classifier = model if isinstance(model, EnergyClassifier) else EnergyClassifier(model)
        return classifier, gate
    if model.classifier is None:
        raise InvalidInputError(
            "attacks run the model, and this guard was loaded without one; give Guard.load(path, "
            "model)"
        )
    if gate is None and model.threshold is not None:
        gate = model.state().parts
    return model.classifier, gate


def _checked(given: Images) -> Examples:
    """Check the images; they are held on the CPU, and go to the model batch by batch."""
    pixels, labels = given.pixels, given.labels
    if labels is None and isinstance(pixels, Tensor):
        labels = torch.zeros(len(pixels), dtype=torch.int64)
    if not isinstance(pixels, Tensor) or not isinstance(labels, Tensor):
        raise InvalidInputError(
            f"got images as {type(pixels).__name__} and labels as {type(labels).__name__}; needed "
            "torch tensors: pixels (N, C, H, W) in [0, 1], labels (N,) int64"
        )
    return Examples.of(pixels.cpu(), labels.cpu(), given.ids)


def _foreign_pixels(name: str, pixels: Tensor) -> Tensor:
    """Check OOD images before the work."""
    try:
        return _checked(Images(pixels)).pixels
    except InvalidInputError as error:
        raise InvalidInputError(f"OOD set {name}: {error}") from None


def _labelled(subject: Subject, examples: Examples, *, known: bool) -> tuple[Examples, str]:
    """Without labels the predicted classes stand for them."""
    if known:
        return examples, "true labels"
    with torch.no_grad():
        parts = [
            subject.forward(part).logits.argmax(dim=1).cpu()
            for part in torch.split(examples.pixels, subject.batch_size)
        ]
    return replace(examples, labels=torch.cat(parts)), "predicted labels"


def _shuffled(examples: Examples, seed: int) -> Examples:
    """Put the images in random order, so that the first n are a random draw."""
    order = np.random.default_rng([seed, 17]).permutation(len(examples))
    return examples.select(torch.from_numpy(order))


def _prepared(
    subject: Subject,
    pool: Examples,
    options: AttackOptions,
    ood: Mapping[str, Tensor],
    eot_samples: int,
    started: float,
    say: Callable[[str], None] | None,
    *,
    closed: bool,
) -> tuple[Context, Plan]:
    """Measure what an image costs, plan, and judge the chosen images as they are."""
    num_classes = _num_classes(subject, pool)
    preset = preset_of(options.preset, num_classes)
    if options.images is not None:
        preset = replace(preset, images=options.images)
    names = CORRUPTION_SETS[options.corruptions]
    # A package that is missing is missed before the work, not after it.
    corruption_facts(names)
    preset = replace(preset, corruptions=names)
    channels = pool.pixels.shape[1]
    threats = options.threats or tuple(
        threat
        for threat in default_threats(channels, with_l2=preset.with_l2 or options.norm is not None)
        if options.norm in (None, threat.norm)
    )
    if closed:
        preset = without_gradients(preset)
    foreign = tuple(Attacker.foreign(name, call) for name, call in options.attackers.items())
    preset = replace(preset, attackers=preset.attackers + foreign)
    store = None
    if options.state is not None:
        fingerprint = _fingerprint(subject, pool, options, threats, ood)
        store = Store(options.state, fingerprint, resume=options.resume)
    speed = measure_speed(subject, pool, gradient=not closed)
    scope = Scope(
        preset,
        threats,
        pilot(subject, pool, threats, options.seed, gradient=not closed),
        len(pool),
        subject.parts is not None,
        {name: len(pixels) for name, pixels in ood.items()},
        eot_samples,
    )
    budget = options.time_budget
    left = None if budget is None else max(0.0, budget - (time.perf_counter() - started))
    plan = replace(make_plan(scope, speed, left), time_budget=budget)
    kept = None if store is None else store.get("plan")
    if kept is not None:
        # The speed of today may ask for another number; the results that are kept decide.
        plan = replace(
            make_plan(replace(scope, available=int(kept["n"])), speed, None),
            time_budget=options.time_budget,
            cut=bool(kept["cut"]),
        )
    elif store is not None:
        store.put("plan", {"n": np.array(plan.n), "cut": np.array(plan.cut)})
    examples = pool.select(slice(0, plan.n))
    runner = Runner(
        speed,
        time_budget=options.time_budget,
        store=store,
        say=say,
        started=started,
        counts=subject.counts,
        seed=options.seed,
    )
    context = Context(
        subject=subject,
        examples=examples,
        clean=subject.judge(examples.pixels, examples.labels),
        preset=preset,
        threats=threats,
        runner=runner,
        seed=options.seed,
        eot_samples=eot_samples,
        gate_source=_gate_source(subject, examples),
    )
    if closed:
        reason = "no gradient reaches the pixels, so only Square and attacks that were given ran"
        runner.ledger.left_out.append({"name": "attacks by gradient", "reason": reason})
    return context, plan


def _num_classes(subject: Subject, pool: Examples) -> int:
    """Return the classifier's number of classes; labels beyond it are of other classes."""
    with torch.no_grad():
        found = int(subject.forward(pool.pixels[:1]).logits.shape[1])
    low, high = int(pool.labels.min()), int(pool.labels.max())
    if low < 0 or high >= found:
        raise InvalidInputError(
            f"got labels from {low} to {high} for a classifier of {found} classes; needed 0 to "
            f"{found - 1}. Check that the images are of the classes that it was trained on"
        )
    return found


def _gate_source(subject: Subject, examples: Examples) -> Source:
    """Tell where attacks on the gate get their gradient from."""
    if subject.parts is None:
        return "none"
    usable, words = score_has_gradient(subject.parts, subject.forward, examples)
    if usable:
        return "score"
    return "none" if "neither" in words else "surrogate"


def _fingerprint(
    subject: Subject,
    pool: Examples,
    options: AttackOptions,
    threats: tuple[Threat, ...],
    ood: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Name what kept results hang on."""
    content = hashlib.blake2b(pool.pixels.numpy().tobytes(), digest_size=16)
    content.update(pool.labels.numpy().tobytes() + pool.ids.numpy().tobytes())
    for name, pixels in ood.items():
        content.update(name.encode() + pixels.numpy().tobytes())
    for module in () if subject.parts is None else vars(subject.parts).values():
        for name, value in {} if module is None else module.state_dict().items():
            content.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return {
        "weights": subject.classifier.weights_hash(),
        "content": content.hexdigest(),
        "preset": options.preset,
        "images": options.images,
        "threats": [[threat.norm, *(item.text for item in threat.epsilons)] for threat in threats],
        "seed": options.seed,
        "batch_size": options.batch_size,
        "score": None if subject.parts is None else subject.parts.score.name,
        "attackers": sorted(options.attackers),
        "corruptions": options.corruptions,
        "package": summary.package_version(),
    }


def _evaluated(
    context: Context,
    plan: Plan,
    options: AttackOptions,
    *,
    pool: Examples,
    of: int,
    label_source: str,
    no_gate: str,
    ood: Mapping[str, Tensor],
    id_scores: NDArray[np.float64] | None,
    noisy: bool,
    started: float,
) -> Robustness:
    norms, chains = [], []
    for threat in context.threats:
        result, chain = _attacked(context, threat)
        norms.append(replace(result, minimal=side_stages.minimal_curve(context, threat, chain)))
        chains.append(chain)
    path = side_stages.followed_energy(context)
    corruptions = side_stages.corruption_table(context, pool)
    sets = {} if context.subject.parts is None else _ood(context, ood, id_scores)
    flags = flags_of(context, norms[0], chains[0], noisy=noisy)
    reference = side_stages.reference_on_survivors(context, norms[0], chains[0])
    context.runner.settle()
    n, clean = len(context.examples), context.clean
    return Robustness(
        preset=context.preset.name,
        n=n,
        of=of,
        label_source=label_source,
        clean=summary.share(~clean.wrong),
        gate=summary.gate_facts(context, no_gate),
        clean_gated=None if context.subject.parts is None else summary.share(~clean.taken),
        norms=tuple(norms),
        ood=sets,
        energy_path=path,
        flags=flags,
        corruptions=corruptions,
        published=(),
        reference=reference,
        cost=summary.cost(context),
        run={
            "seconds": round(time.perf_counter() - started, 2),
            "stages": context.runner.ledger.seconds,
        },
        settings=summary.settings(context, plan, options.time_budget, noisy=noisy),
        left_out=tuple(context.runner.ledger.left_out),
    )


def _attacked(context: Context, threat: Threat) -> tuple[NormResult, Chain]:
    """Run aims A, B and C at every epsilon of a norm."""
    chain = Chain.begin(context, threat)
    gate = None if context.subject.parts is None else GateChain.begin(context)
    rows: list[EpsilonResult] = []
    for index, epsilon in enumerate(threat.epsilons):
        results, complete = attack_epsilon(context, threat, index, chain)
        as_files = sharpen(context, threat, index, chain)
        gated = None
        if gate is not None:
            gated = attack_gate(context, threat, index, chain, gate, complete=complete)
        rows.append(
            summary.epsilon_result(
                context, epsilon, results, chain, gated, complete=complete, as_files=as_files
            )
        )
    return NormResult(threat.norm, threat.reference.text, tuple(rows)), chain


def _ood(
    context: Context, ood: Mapping[str, Tensor], id_scores: NDArray[np.float64] | None
) -> dict[str, OodResult]:
    """Run aim D on every OOD set, along the first norm."""
    if not context.preset.ood_images:
        return {}
    if not ood:
        reason = "no OOD set of images was given; add --ood NAME=SPEC"
        context.runner.ledger.left_out.append(
            {"name": "make unknown images accepted", "reason": reason}
        )
    scores = context.clean.score.numpy() if id_scores is None else id_scores
    found = {}
    for name, pixels in ood.items():
        order = np.random.default_rng([context.seed, 18]).permutation(len(pixels))
        few = pixels[torch.from_numpy(order[: context.preset.ood_images])]
        result = attack_ood(context, context.threats[0], name, few, scores)
        if result is not None:
            found[name] = result
    return found
