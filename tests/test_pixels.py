"""From images to the model's input: equal to timm's evaluation transform, refusals with a guess."""

import itertools

import numpy as np
import oracles
import pytest
import torch
from PIL import Image

from ebm_guard.data.images import to_input
from ebm_guard.errors import InvalidInputError
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.model.pixels import INTERPOLATIONS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (W, H): odd, tall, wide, smaller and larger than the input, and exactly its size.
SIZES = ((301, 197), (33, 80), (50, 32), (32, 32), (31, 33), (17, 9), (32, 37), (129, 128))
RGB = Preprocessing(MEAN, STD)


def image(width, height, mode="RGB"):
    rng = oracles.generator("image", width, height, mode)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def timm_transform(**config):
    from timm.data import create_transform

    return create_transform(**config, is_training=False)


def close(ours, theirs):
    # Same Pillow pixels; the normalisation may round differently by an ulp or two.
    difference = np.abs(ours - theirs.numpy()).max()
    pixels = difference * max(STD)
    assert pixels <= 1e-6


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 0.9, 0.95, 1.0])
def test_equals_timm(interpolation, crop_pct):
    settings = {"mean": MEAN, "std": STD, "crop_pct": crop_pct, "interpolation": interpolation}
    theirs = timm_transform(input_size=(3, 32, 32), crop_mode="center", **settings)
    ours = Preprocessing(image_size=(32, 32), **settings)
    for width, height in SIZES:
        picture = image(width, height)
        prepared = to_input(picture, ours)
        assert prepared.shape == (3, 32, 32)
        assert prepared.dtype == np.float32
        assert prepared.flags.c_contiguous
        close(prepared, theirs(picture))


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (40, 30)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_squash_equals_timm(size, crop_pct):
    settings = {"mean": MEAN, "std": STD, "crop_pct": crop_pct, "interpolation": "bicubic"}
    theirs = timm_transform(input_size=(3, *size), crop_mode="squash", **settings)
    ours = Preprocessing(image_size=size, crop_mode="squash", **settings)
    for width, height in SIZES:
        picture = image(width, height)
        close(to_input(picture, ours), theirs(picture))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_another_interpolation_fails_the_same_comparison(interpolation):
    settings = {"mean": MEAN, "std": STD, "crop_pct": 0.875}
    theirs = timm_transform(input_size=(3, 32, 32), interpolation="bicubic", **settings)
    ours = Preprocessing(image_size=(32, 32), interpolation=interpolation, **settings)
    picture = image(301, 197)
    with pytest.raises(AssertionError):
        close(to_input(picture, ours), theirs(picture))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout"])
def test_a_timm_model_is_prepared_as_timm_does(name):
    import timm
    from timm.data import resolve_model_data_config

    net = timm.create_model(name, pretrained=False, num_classes=3).eval()
    ours = EnergyClassifier(net).preprocessing
    # timm's default ignores the test size; its validate.py, and ours, take it where there is one.
    theirs = timm_transform(**resolve_model_data_config(net, use_test_size=True))
    for width, height in ((301, 197), (99, 400)):
        picture = image(width, height)
        close(to_input(picture, ours), theirs(picture))


def test_the_test_size_and_crop_of_a_cfg_are_taken():
    net = torch.nn.Linear(2, 2)
    net.pretrained_cfg = {
        "mean": MEAN,
        "std": STD,
        "input_size": (3, 224, 224),
        "test_input_size": (3, 288, 288),
        "crop_pct": 0.875,
        "test_crop_pct": 0.95,
        "interpolation": "bilinear",
    }
    found = Preprocessing.from_model(net)
    assert (found.image_size, found.crop_pct) == ((288, 288), 0.95)
    assert (found.interpolation, found.crop_mode) == ("bilinear", "center")
    assert "pretrained_cfg" in found.source


def test_a_cfg_without_crop_means_no_crop_and_no_cfg_means_none():
    net = torch.nn.Linear(2, 2)
    net.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "input_size": (1, 8, 8)}
    assert Preprocessing.from_model(net).crop_pct == 1.0
    assert Preprocessing.from_model(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA"])
def test_other_modes_become_rgb(mode):
    picture = image(20, 20, mode)
    ours = to_input(picture, RGB)
    expected = to_input(picture.convert("RGB"), RGB)
    assert np.array_equal(ours, expected)
    if mode == "L":
        pixels = ours * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
        assert np.allclose(pixels, np.asarray(picture) / 255, atol=1e-6)


def test_rgb_becomes_grey_by_pillows_l():
    picture = image(20, 20)
    grey = to_input(picture, Preprocessing((0.0,), (1.0,)))
    assert grey.shape == (1, 20, 20)
    assert np.array_equal(np.rint(grey[0] * 255).astype(np.uint8), np.asarray(picture.convert("L")))


def test_arrays_of_the_input_size_are_never_cropped():
    preprocessing = Preprocessing(MEAN, STD, image_size=(32, 32), crop_pct=0.5)
    picture = image(32, 32)
    kept = to_input(picture, preprocessing, is_array=True)
    assert np.array_equal(kept, to_input(picture, RGB))
    assert not np.array_equal(kept, to_input(picture, preprocessing))
    other = image(33, 32)
    assert np.array_equal(
        to_input(other, preprocessing, is_array=True), to_input(other, preprocessing)
    )


def test_a_centre_crop_needs_a_square():
    with pytest.raises(InvalidInputError, match="square"):
        to_input(image(40, 40), Preprocessing(MEAN, STD, image_size=(32, 24)))


def test_normalising_pixels_equals_preparing_the_image():
    picture = image(24, 16)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    assert np.allclose(RGB.normalize(pixels[None])[0].numpy(), to_input(picture, RGB), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisation_is_affine_and_has_a_gradient(dtype):
    pixels = torch.rand(2, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    pixels.requires_grad_()
    found = RGB.normalize(pixels)
    assert found.dtype == dtype
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        truth = (pixels[:, channel].double() - mean) / std
        assert torch.allclose(found[:, channel].double(), truth, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert torch.allclose(gradient[0, :, 0, 0].double(), 1 / torch.tensor(STD).double(), rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "guess"),
    [
        (0.0, 255.0, "divide by 255"),
        (0.0, 2.0, "divide by 255"),
        (-2.1, 2.6, "normalised already"),
        (0.0, 1.01, "clamp"),
    ],
)
def test_pixels_outside_the_box_are_refused_with_a_guess(low, high, guess):
    pixels = torch.full((2, 3, 4, 4), 0.5)
    pixels[0, 0, 0, 0], pixels[1, 2, 3, 3] = low, high
    with pytest.raises(InvalidInputError, match=rf"needed \[0, 1\].*{guess}"):
        RGB.check_pixels(pixels)


def test_the_box_itself_is_allowed():
    RGB.check_pixels(torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1))
    RGB.check_pixels(torch.zeros(0, 3, 4, 4))


def test_pixels_that_are_nan_are_refused():
    pixels = torch.full((2, 3, 4, 4), 0.5)
    pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="NaN") as caught:
        RGB.check_pixels(pixels)
    # Clamping keeps NaN, so it must not be the advice.
    assert "clamp" not in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "divide uint8 images by 255"),
        (torch.zeros(3, 4, 4), r"\(B, 3, H, W\)"),
        (torch.zeros(2, 1, 4, 4), "got 1 channels; this model takes 3"),
        (np.zeros((2, 3, 4, 4)), "ndarray"),
    ],
)
def test_what_is_not_a_batch_of_pixels_is_refused(pixels, message):
    with pytest.raises(InvalidInputError, match=message):
        RGB.check_pixels(pixels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": (0.2, 0.2)}, "one value per channel"),
        ({"std": (0.2, 0.0, 0.2)}, "std > 0"),
        ({"mean": (), "std": ()}, "one value per channel"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "1 or 3"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.2}, "crop_pct"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"crop_mode": "border"}, "center"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Preprocessing(**({"mean": MEAN, "std": STD} | settings))


def test_settings_survive():
    for size, mode in itertools.product([None, (32, 32)], ["center", "squash"]):
        one = Preprocessing(MEAN, STD, size, 0.9, "bilinear", mode, "test")
        assert Preprocessing.from_dict(one.to_dict()) == one


def test_a_model_without_preprocessing_says_what_to_give():
    with pytest.raises(InvalidInputError, match=r"mean=\(...\), std=\(...\)"):
        EnergyClassifier(torch.nn.Linear(2, 2).eval()).pixels(torch.zeros(1, 3, 4, 4))
