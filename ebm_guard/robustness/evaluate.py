"""One call: attack a classifier and its gate, corrupt its images, and say what it all means.

Protocol: the images are drawn at random; each attack of the preset gets what the attack before
left standing, at each epsilon what was left at the smaller one. Final images are re-scored by the
deployed forward pass. A robust accuracy is an upper bound: a stronger attack may find more.
"""

from __future__ import annotations

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
from ebm_guard.robustness.gated import GateChain, attack_gate, attack_ood
from ebm_guard.robustness.label_flips import Chain, Context, attack_epsilon, sharpen
from ebm_guard.robustness.masking import random_forward
from ebm_guard.robustness.masking_probes import CLOSED, forward_problem
from ebm_guard.robustness.masking_stage import flags_of
from ebm_guard.robustness.options import AttackOptions, Images
from ebm_guard.robustness.plan import Plan
from ebm_guard.robustness.preparing import (
    checked,
    foreign_pixels,
    labelled,
    prepared,
    shuffled,
)
from ebm_guard.robustness.purify_stage import purified
from ebm_guard.robustness.records import EpsilonResult, NormResult, OodResult, Robustness
from ebm_guard.robustness.subject import Subject
from ebm_guard.robustness.threat import Threat

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
    foreign = {name: foreign_pixels(name, pixels) for name, pixels in (ood or {}).items()}
    known = checked(given)
    with subject.untouched(options.seed):
        subject.check(known.pixels)
        examples, label_source = labelled(subject, known, known=given.labels is not None)
        examples = shuffled(examples, options.seed)
        few = examples.select(slice(0, 8))
        noisy = random_forward(subject.forward, few)
        closed = forward_problem(subject.forward, few).startswith(CLOSED)
        if noisy:
            subject = subject.with_draws(_DRAWS)
        context, plan = prepared(
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
    purification = purified(context, norms[0], chains[0], options.purify)
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
        right=tuple((~clean.wrong).tolist()),
        purification=purification,
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
