"""Before the attacks: check the images, choose what is run, measure, plan."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_guard.attacks import Examples
from ebm_guard.errors import InvalidInputError
from ebm_guard.robustness import summary
from ebm_guard.robustness.corruptions import corruption_facts
from ebm_guard.robustness.gate_attacks import Source, score_has_gradient
from ebm_guard.robustness.label_flips import Context
from ebm_guard.robustness.options import CORRUPTION_SETS, AttackOptions, Images
from ebm_guard.robustness.plan import Plan, Scope, make_plan, pilot
from ebm_guard.robustness.presets import Attacker, Preset, preset_of, without_gradients
from ebm_guard.robustness.runner import Runner, Speed, Store, measure_speed
from ebm_guard.robustness.subject import Subject
from ebm_guard.robustness.threat import Threat, default_threats


def checked(given: Images) -> Examples:
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


def foreign_pixels(name: str, pixels: Tensor) -> Tensor:
    """Check OOD images before the work."""
    try:
        return checked(Images(pixels)).pixels
    except InvalidInputError as error:
        raise InvalidInputError(f"OOD set {name}: {error}") from None


def labelled(subject: Subject, examples: Examples, *, known: bool) -> tuple[Examples, str]:
    """Without labels the predicted classes stand for them."""
    if known:
        return examples, "true labels"
    with torch.no_grad():
        parts = [
            subject.forward(part).logits.argmax(dim=1).cpu()
            for part in torch.split(examples.pixels, subject.batch_size)
        ]
    return replace(examples, labels=torch.cat(parts)), "predicted labels"


def shuffled(examples: Examples, seed: int) -> Examples:
    """Put the images in random order, so that the first n are a random draw."""
    order = np.random.default_rng([seed, 17]).permutation(len(examples))
    return examples.select(torch.from_numpy(order))


def prepared(
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
    preset, threats = _asked(subject, pool, options, closed=closed)
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
        None if closed else options.purify,
    )
    plan = _chosen_plan(scope, speed, options, store, started)
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


def _asked(
    subject: Subject, pool: Examples, options: AttackOptions, *, closed: bool
) -> tuple[Preset, tuple[Threat, ...]]:
    """Return what is run, and along which norms."""
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
    return preset, threats


def _chosen_plan(
    scope: Scope, speed: Speed, options: AttackOptions, store: Store | None, started: float
) -> Plan:
    """Plan within what is left of the budget, or as an interrupted run did."""
    budget = options.time_budget
    kept = None if store is None else store.get("plan")
    if kept is not None:
        # The speed of today may ask for another number; the results that are kept decide.
        scope = replace(scope, available=int(kept["n"]))
        return replace(make_plan(scope, speed, None), time_budget=budget, cut=bool(kept["cut"]))
    left = None if budget is None else max(0.0, budget - (time.perf_counter() - started))
    plan = replace(make_plan(scope, speed, left), time_budget=budget)
    if store is not None:
        store.put("plan", {"n": np.array(plan.n), "cut": np.array(plan.cut)})
    return plan


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
        "purify": None if options.purify is None else options.purify.to_dict(),
        "package": summary.package_version(),
    }
