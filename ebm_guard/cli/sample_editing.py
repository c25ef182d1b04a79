"""``ebm-guard sample --inpaint, --denoise, --morph``: what the energy does to damaged images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import Command, grouped

if TYPE_CHECKING:
    from ebm_guard.model import EnergyClassifier
    from ebm_guard.report.editing_images import EditPictures
    from ebm_guard.sampling.sampler import Sampler

# Pictures of the chains along their way.
_FRAMES = 13
_HOLE, _NOISE_STD = 0.5, 0.1


@dataclass(frozen=True)
class EditOptions:
    """What is asked for beside samples.

    Args:
        inpaint: images to hide a part of, or None.
        denoise: images to add noise to, or None.
        morph: two classes, as given, or None.
        hole: share of each side that is hidden, or None for a half.
        noise_std: of the noise, or None for 0.1.
        conditional: whether chains are told the true class.
    """

    inpaint: int | None
    denoise: int | None
    morph: str | None
    hole: float | None
    noise_std: float | None
    conditional: bool

    @property
    def wanted(self) -> bool:
        """Whether anything is asked for."""
        return not (self.inpaint is None and self.denoise is None and self.morph is None)


_OPTIONS: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--inpaint",
        type=click.IntRange(min=1),
        metavar="N",
        help="Hide the middle of N images of --data and fill it by chains.",
    ),
    click.option(
        "--denoise",
        type=click.IntRange(min=1),
        metavar="N",
        help="Add noise to N images of --data and let chains take it out.",
    ),
    click.option(
        "--morph", metavar="A,B", help="Lead chains from class A to class B, numbers or names."
    ),
    click.option(
        "--hole",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Share of each side that --inpaint hides; default: 0.5.",
    ),
    click.option(
        "--noise-std",
        type=click.FloatRange(min=0, min_open=True),
        help="Noise of --denoise, for pixels in [0, 1]; default: 0.1.",
    ),
    click.option(
        "--conditional",
        is_flag=True,
        help="Tell --inpaint and --denoise the true class: E(x, y), not E(x).",
    ),
)


def edit_options(command: Command) -> Command:
    """Add the options of :class:`EditOptions`; the command gets them as ``edits``."""
    return grouped(command, "edits", EditOptions, _OPTIONS)


def check_edits(edits: EditOptions, data: str | None) -> None:
    """Refuse edits that no images are given for, and settings of edits that are not asked for.

    Raises:
        InvalidInputError: no --data, --morph does not name two classes, or an option is idle.
    """
    from ebm_guard.errors import InvalidInputError

    damaged = edits.inpaint is not None or edits.denoise is not None
    for option, given, needed, there in (
        ("--hole", edits.hole is not None, "--inpaint N", edits.inpaint is not None),
        ("--noise-std", edits.noise_std is not None, "--denoise N", edits.denoise is not None),
        ("--conditional", edits.conditional, "--inpaint N or --denoise N", damaged),
    ):
        if given and not there:
            raise InvalidInputError(f"got {option} without {needed}; add it, or leave {option} out")
    if data is None and (edits.inpaint is not None or edits.denoise is not None):
        raise InvalidInputError("got --inpaint or --denoise without --data; give labelled images")
    if edits.morph is not None and len(_pair(edits.morph)) != 2:
        raise InvalidInputError(f"got --morph {edits.morph!r}; needed two classes, such as 3,7")


def _pair(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def check_edit_rows(
    edits: EditOptions, classifier: EnergyClassifier, given: Mapping[str, Any], num_classes: int
) -> None:
    """Refuse edits that these images or classes do not allow, before any chain is run.

    Raises:
        InvalidInputError: more images than there are, or classes that the model does not have.
    """
    from ebm_guard.errors import InvalidInputError
    from ebm_guard.sampling.subject import class_numbers

    for option, count in (("--inpaint", edits.inpaint), ("--denoise", edits.denoise)):
        if count is not None and count > len(given["images"]):
            raise InvalidInputError(
                f"got {option} {count} and {len(given['images'])} images (2,000 are read at most); "
                "ask for fewer"
            )
    if edits.morph is not None:
        class_numbers(_pair(edits.morph), classifier, num_classes)


def run_edits(
    edits: EditOptions,
    classifier: EnergyClassifier,
    given: Mapping[str, Any],
    *,
    sampler: Sampler,
    name: str,
    step_size: float | None,
    num_chains: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, EditPictures]]:
    """Run what is asked for; return sections of the report, and their pictures.

    Args:
        edits: what is asked for.
        classifier: the wrapped model.
        given: ``images`` and ``labels``, or nothing.
        sampler: of the command.
        name: of the sampler: denoising chooses a step that fits the noise.
        step_size: as given, or None.
        num_chains: of a morph.
        seed: of all random numbers.
    """
    from ebm_guard.report import editing_images as pictures
    from ebm_guard.report import editing_report as sections
    from ebm_guard.sampling import centre_mask, denoise, inpaint, morph

    parts: dict[str, Any] = {}
    shown: dict[str, EditPictures] = {}
    common: dict[str, Any] = {"conditional": edits.conditional, "num_frames": _FRAMES, "seed": seed}
    if edits.inpaint is not None:
        images, labels = _rows(given, edits.inpaint, seed)
        known = centre_mask(images.shape[2], images.shape[3], edits.hole or _HOLE)
        filled = inpaint(classifier, images, known, labels, sampler=sampler, **common)
        parts["inpainting"] = sections.inpainting_section(filled)
        names = _names(classifier, labels, filled.predicted["chains"])
        shown["inpainting"] = pictures.inpainting_pictures(filled, names)
    if edits.denoise is not None:
        images, labels = _rows(given, edits.denoise, seed)
        by_name = step_size is None
        clean = denoise(
            classifier,
            images,
            labels,
            noise_std=edits.noise_std or _NOISE_STD,
            sampler=name if by_name else sampler,
            num_steps=sampler.num_steps,
            **common,
        )
        parts["denoising"] = sections.denoising_section(clean)
        names = _names(classifier, labels, clean.predicted["chains"])
        shown["denoising"] = pictures.denoising_pictures(clean, names)
    if edits.morph is not None:
        a, b = _pair(edits.morph)
        way = morph(classifier, a, b, num_chains=num_chains, sampler=sampler, seed=seed, **given)
        parts["morphing"] = sections.morph_section(way)
        shown["morphing"] = pictures.morph_pictures(way)
    return parts, shown


def _rows(given: Mapping[str, Any], count: int, seed: int) -> tuple[Any, Any]:
    """Choose random images with their labels."""
    import torch

    images, labels = given["images"], given["labels"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return images[order], labels[order]


def _names(classifier: EnergyClassifier, labels: Any, predicted: Any) -> tuple[str, ...]:
    """Say for each image what it is and what the net names the end of its chain."""
    from ebm_guard.sampling.subject import class_name

    return tuple(
        f"{class_name(classifier, label)}, named {class_name(classifier, found)}"
        for label, found in zip(labels.tolist(), predicted.tolist(), strict=True)
    )
