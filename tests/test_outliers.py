"""Synthetic outliers: what each kind must keep, what it must destroy, and a source made of them."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ebm_guard.data import batches, open_source
from ebm_guard.data.outliers import (
    GUARD_KINDS,
    SHIFT_KINDS,
    TRAINING_KINDS,
    OutlierSource,
    get_kind,
    make_outliers,
)
from ebm_guard.data.outliers.kinds import Partners
from ebm_guard.data.sources.arrays import ArraySource
from ebm_guard.data.sources.base import StreamSource
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model.pixels import Preprocessing

ALL = TRAINING_KINDS + GUARD_KINDS + SHIFT_KINDS
GREY = Preprocessing((0.5,), (0.5,))
SHAPES = [(8, 8), (28, 28), (32, 32, 3), (33, 47, 3), (8, 8, 1), (2, 2), (5, 3, 3), (130, 97, 3)]


def picture(rng, shape, dtype):
    values = rng.random(shape)
    if dtype == np.uint8:
        return (values * 256).astype(np.uint8)
    return values.astype(dtype)


def make(name, shape=(32, 32, 3), dtype=np.uint8, key=0):
    rng = oracles.generator("picture", name, shape, np.dtype(dtype).name, key)
    image, partner = picture(rng, shape, dtype), picture(rng, shape, dtype)
    return image, partner, get_kind(name).make(image, partner, np.random.default_rng(key))


# ---- the groups


def test_the_groups_share_no_kind_and_no_function():
    assert len(set(ALL)) == len(ALL)
    functions = [get_kind(name).function for name in ALL]
    codes = {
        function.__code__.co_code + repr(function.__code__.co_consts).encode()
        for function in functions
    }
    assert len({id(function) for function in functions}) == len(codes) == len(ALL)


@pytest.mark.parametrize("group", [TRAINING_KINDS, GUARD_KINDS])
def test_each_group_destroys_the_whole_and_the_texture(group):
    assert {"structure", "texture"} <= {get_kind(name).destroys for name in group}


def test_shifts_destroy_nothing_and_outliers_something():
    assert {get_kind(name).destroys for name in SHIFT_KINDS} == {"none"}
    assert "none" not in {get_kind(name).destroys for name in TRAINING_KINDS + GUARD_KINDS}


def test_an_unknown_kind_is_refused_with_near_names():
    with pytest.raises(InvalidInputError, match="patch_shuffle"):
        get_kind("patch_shufle")


# ---- every kind


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_shape_type_and_range_are_kept(name, shape, dtype):
    image, partner, made = make(name, shape, dtype)
    assert (made.shape, made.dtype) == (image.shape, image.dtype)
    assert not np.array_equal(made, image)
    assert made.min() >= 0
    assert made.max() <= (255 if dtype == np.uint8 else 1)
    # The inputs are as they were, and the same generator gives the same image.
    again = make(name, shape, dtype)
    assert all(np.array_equal(a, b) for a, b in zip((image, partner, made), again, strict=True))


@pytest.mark.parametrize("name", [name for name in ALL if name != "uniform_noise"])
def test_uint8_and_float_give_the_same_picture(name):
    # Uniform noise is drawn in whole numbers for uint8.
    image, partner, made = make(name)
    floats = get_kind(name).make(image / 255, partner / 255, np.random.default_rng(0))
    assert np.abs(floats * 255 - made).max() <= 0.5 + 1e-9


@oracles.QUICK
@given(
    st.integers(2, 40), st.integers(2, 40), st.sampled_from([(), (1,), (3,)]), st.integers(0, 99)
)
def test_shuffles_keep_the_multiset_of_pixels(height, width, channels, key):
    for name in ("patch_shuffle", "pixel_shuffle"):
        image, _, made = make(name, (height, width, *channels), key=key)
        before, after = (
            sorted(map(tuple, part.reshape(height * width, -1).tolist())) for part in (image, made)
        )
        assert before == after


def test_patch_shuffle_moves_whole_patches():
    image = np.arange(32 * 32).reshape(32, 32) / 1024
    made = get_kind("patch_shuffle").make(image, None, np.random.default_rng(0))
    patches = {
        image[y : y + 8, x : x + 8].tobytes() for y in range(0, 32, 8) for x in range(0, 32, 8)
    }
    moved = {made[y : y + 8, x : x + 8].tobytes() for y in range(0, 32, 8) for x in range(0, 32, 8)}
    assert patches == moved


def test_pixel_shuffle_keeps_every_block_in_its_place():
    image, _, made = make("pixel_shuffle", (32, 32))
    for y in range(0, 32, 4):
        for x in range(0, 32, 4):
            block = (slice(y, y + 4), slice(x, x + 4))
            assert sorted(image[block].ravel()) == sorted(made[block].ravel())


@oracles.QUICK
@given(st.integers(0, 99))
def test_blend_is_the_mean_and_stays_between(key):
    image, partner, made = make("blend", key=key)
    wide = [part.astype(np.int64) for part in (image, partner, made)]
    assert (np.minimum(wide[0], wide[1]) <= wide[2]).all()
    assert (wide[2] <= np.maximum(wide[0], wide[1])).all()
    assert (np.abs(2 * wide[2] - wide[0] - wide[1]) <= 1).all()


@oracles.QUICK
@given(st.integers(0, 99), st.sampled_from([(32, 32, 3), (9, 14), (2, 2)]))
def test_paste_is_a_rectangle_of_the_partner(key, shape):
    height, width = shape[:2]
    rng = oracles.generator("paste", key)
    # Every value of the partner is there once, and none in the image: the source is known.
    image = np.zeros(shape, np.float64)
    partner = (1 + np.arange(height * width)).reshape(height, width) / (1 + height * width)
    partner = partner if len(shape) == 2 else np.repeat(partner[..., None], 3, axis=2)
    made = get_kind("paste").make(image, partner, rng)
    flat = made if made.ndim == 2 else made[..., 0]
    rows, columns = np.nonzero(flat)
    high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    cut = flat[rows.min() : rows.min() + high, columns.min() : columns.min() + wide]
    source = np.argwhere((partner if partner.ndim == 2 else partner[..., 0]) == cut[0, 0])[0]
    ground = partner if partner.ndim == 2 else partner[..., 0]
    assert np.array_equal(cut, ground[source[0] : source[0] + high, source[1] : source[1] + wide])
    assert high / height >= 0.5
    assert high - 1 <= 0.7 * height
    assert wide / width >= 0.5
    assert wide - 1 <= 0.7 * width


def test_rotation_is_exact_and_takes_all_angles():
    image, _, _ = make("rotation")
    turned = {np.rot90(image, k).tobytes(): k for k in (1, 2, 3)}
    found = {
        turned[get_kind("rotation").make(image, None, np.random.default_rng(key)).tobytes()]
        for key in range(40)
    }
    assert found == {1, 2, 3}
    wide, _, made = make("rotation", (20, 33, 3))
    assert np.array_equal(made, wide[::-1, ::-1])


def test_moments_of_the_noises():
    rng = oracles.generator("moments")
    image = np.clip(rng.normal([0.4, 0.5, 0.6], [0.05, 0.08, 0.1], (200, 200, 3)), 0, 1)
    gaussian = get_kind("gaussian_noise").make(image, None, rng)
    assert np.allclose(gaussian.mean((0, 1)), image.mean((0, 1)), atol=0.003)
    assert np.allclose(gaussian.std((0, 1)), image.std((0, 1)), rtol=0.03)
    flat = get_kind("gaussian_noise").make(np.full((200, 200), 0.5), None, rng)
    assert flat.std() == pytest.approx(0.05, rel=0.05)
    uniform = get_kind("uniform_noise").make(image, None, rng)
    assert uniform.mean() == pytest.approx(0.5, abs=0.005)
    assert uniform.var() == pytest.approx(1 / 12, rel=0.02)
    whole = get_kind("uniform_noise").make((image * 255).astype(np.uint8), None, rng)
    assert set(np.unique(whole)) == set(range(256))
    for noise in (gaussian, uniform):
        centred = noise - noise.mean((0, 1))
        assert abs(np.corrcoef(centred[:-1].ravel(), centred[1:].ravel())[0, 1]) < 0.02


def test_smooth_noise_is_smooth_and_in_the_colours_of_the_image():
    image, _, made = make("smooth_noise", (64, 64, 3))
    values, noise = made.astype(float), image.astype(float)
    assert np.abs(np.diff(values, axis=0)).mean() < 0.15 * np.abs(np.diff(noise, axis=0)).mean()
    red = np.zeros((64, 64, 3))
    red[:32, :, 0] = 1
    found = get_kind("smooth_noise").make(red, None, np.random.default_rng(0))
    assert found[..., 1:].max() == 0
    assert np.ptp(found[..., 0]) > 0.5


@pytest.fixture(scope="module")
def photographs(data_dir):
    return open_source(f"npz:{data_dir / 'cifar10_test.npz'}[:50]")


@pytest.mark.parametrize("name", SHIFT_KINDS)
def test_shifts_are_mild(name, photographs):
    shifted = OutlierSource(photographs, name)
    for row in range(50):
        before, after = (np.asarray(part.load(row), float) / 255 for part in (photographs, shifted))
        assert 0 < np.abs(before - after).mean() <= 0.11
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.95


def test_outliers_are_not_mild(photographs):
    source = photographs
    for name in TRAINING_KINDS + GUARD_KINDS:
        made = OutlierSource(source, name)
        away = [
            np.abs(np.asarray(made.load(row), float) - np.asarray(source.load(row), float)).mean()
            for row in range(50)
        ]
        assert np.mean(away) / 255 > 0.05, name


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 1.5), "Undo the normalisation"),
        (np.full((4, 4), np.nan), "Undo the normalisation"),
        (np.full((4, 4), -0.1), "Undo the normalisation"),
        (np.zeros(4), "shape"),
        (np.zeros((0, 4)), "shape"),
    ],
)
def test_malformed_images_are_refused(image, words):
    with pytest.raises(InvalidInputError, match=words):
        get_kind("patch_shuffle").make(image, None, np.random.default_rng(0))


def test_what_cannot_be_changed_or_paired_is_refused():
    rng = np.random.default_rng(0)
    plain = np.zeros((8, 8, 3), np.uint8)
    for name in ("patch_shuffle", "pixel_shuffle", "rotation", "smooth_noise", "blend", "blur"):
        with pytest.raises(InvalidInputError, match="leaves this image as it is"):
            get_kind(name).make(plain, plain, rng)
    with pytest.raises(InvalidInputError, match="needs two images"):
        get_kind("blend").make(plain, None, rng)
    with pytest.raises(InvalidInputError, match="one shape and type"):
        get_kind("paste").make(plain, plain[:4], rng)


# ---- batches of tensors


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_made_by_the_same_functions(name, dtype):
    rng = oracles.generator("tensor", name)
    batch = torch.from_numpy(picture(rng, (4, 3, 16, 16), np.uint8))
    batch = batch if dtype == torch.uint8 else (batch / 255).to(dtype)
    made = make_outliers(batch, name, np.random.default_rng(5))
    assert (made.shape, made.dtype) == (batch.shape, batch.dtype)
    assert torch.equal(made, make_outliers(batch, name, np.random.default_rng(5)))
    assert all(not torch.equal(a, b) for a, b in zip(batch, made, strict=True))
    if dtype == torch.uint8 and not get_kind(name).partner:
        generator = np.random.default_rng(5)
        for row in range(4):
            image = batch[row].permute(1, 2, 0).numpy()
            single = get_kind(name).make(image, None, generator)
            assert np.array_equal(made[row].permute(1, 2, 0).numpy(), single)


def test_blends_in_a_batch_cross_classes():
    values = torch.tensor([0.0, 0.2, 1.0, 0.8])[:, None, None, None].expand(4, 1, 4, 4)
    labels = torch.tensor([0, 0, 1, 1])
    for seed in range(20):
        made = make_outliers(values, "blend", np.random.default_rng(seed), labels)
        means = made.mean(dim=(1, 2, 3))
        assert (means[:2] >= 0.4).all()
        assert (means[2:] <= 0.6).all()


def test_make_outliers_leaves_the_batch_and_global_random_state():
    batch = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before, state = batch.detach().clone(), torch.get_rng_state()
    made = make_outliers(batch, "gaussian_noise", np.random.default_rng(0))
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not made.requires_grad


def test_malformed_batches_are_refused():
    rng = np.random.default_rng(0)
    batch = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInputError, match="B, C, H, W"):
        make_outliers(batch[0], "blend", rng)
    with pytest.raises(InvalidInputError, match="labels of shape"):
        make_outliers(batch, "blend", rng, torch.zeros(2))
    with pytest.raises(InvalidInputError, match="3 images of one class"):
        make_outliers(batch, "blend", rng, torch.zeros(3))
    with pytest.raises(InvalidInputError, match="1 image"):
        make_outliers(batch[:1], "paste", rng)
    assert make_outliers(batch[:0], "blend", rng).shape == (0, 1, 8, 8)


@oracles.QUICK
@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(0, 9))
def test_partners_are_of_another_class_and_all_of_them_come(labels, key):
    known = np.array(labels)
    if len(set(labels)) == 1:
        with pytest.raises(InvalidInputError, match="one class"):
            Partners(len(labels), known)
        return
    partners, rng = Partners(len(labels), known), np.random.default_rng(key)
    drawn = {partners.draw(0, rng) for _ in range(60 * len(labels))}
    assert drawn == set(np.flatnonzero(known != known[0]).tolist())


# ---- the source


def array_source(rng, n=12, shape=(8, 8), labels=True, spec="npz:mine.npz"):
    rows = np.arange(n, dtype=np.int64)
    return ArraySource(
        spec, picture(rng, (n, *shape), np.uint8), rows, rows % 3 if labels else None, None
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("labels", [True, False])
def test_a_source_is_the_same_for_all_batches_and_workers(name, labels):
    base = array_source(oracles.generator("source", name), labels=labels)
    source = OutlierSource(base, name, seed=3)
    assert source.spec == f"synthetic:{name} of npz:mine.npz"
    kept = labels and name in SHIFT_KINDS
    assert (source.labels is not None) == kept
    runs = []
    for size, workers in ((12, 0), (5, 0), (4, 2)):
        parts = list(batches(source, GREY, batch_size=size, workers=workers))
        assert all(not part.skipped for part in parts)
        runs.append(
            (
                torch.cat([part.inputs for part in parts]),
                np.concatenate([part.hashes for part in parts]),
            )
        )
    assert all(torch.equal(runs[0][0], run[0]) for run in runs)
    original = np.concatenate([part.hashes for part in batches(base, GREY)])
    assert not np.isin(runs[0][1], original).any()
    backwards = [np.asarray(source.load(row)) for row in reversed(range(12))][::-1]
    part = source.subset(np.array([7, 2]))
    assert np.array_equal(np.asarray(part.load(0)), backwards[7])
    other = OutlierSource(base, name, seed=4)
    if name not in ("blur",):
        assert any(not np.array_equal(np.asarray(other.load(r)), backwards[r]) for r in range(12))


def test_images_that_a_kind_leaves_are_skipped_with_a_reason():
    images = picture(oracles.generator("skip"), (4, 8, 8), np.uint8)
    images[2] = 7
    base = ArraySource("npz:mine.npz", images, np.arange(4), None, None)
    (batch,) = batches(OutlierSource(base, "patch_shuffle"), GREY)
    assert len(batch.ids) == 3
    assert batch.skipped[0][0] == "2"
    assert "leaves this image as it is" in batch.skipped[0][1]
    with pytest.raises(DataError, match="image 2 of npz"):
        OutlierSource(base, "patch_shuffle").load(2)


def test_folders_of_different_sizes_and_modes(tmp_path):
    rng = oracles.generator("folder")
    modes = [("a", "RGB", (20, 30, 3)), ("b", "L", (16, 9)), ("c", "RGBA", (11, 11, 4))]
    for name, mode, shape in modes:
        (tmp_path / name).mkdir()
        image = Image.fromarray(picture(rng, shape, np.uint8))
        assert image.mode == mode
        image.save(tmp_path / name / "x.png")
    base = open_source(str(tmp_path))
    for name in ALL:
        source = OutlierSource(base, name)
        for row in range(3):
            made = source.load(row)
            assert made.size == base.load(row).size
            assert made.mode == ("L" if row == 1 else "RGB")
        settings = Preprocessing((0.5,) * 3, (0.5,) * 3, image_size=(8, 8))
        (batch,) = batches(source, settings)
        assert batch.inputs.shape == (3, 3, 8, 8)


def test_streams_and_single_classes_are_refused():
    class Stream(StreamSource):
        def read(self):
            yield Image.new("L", (8, 8)), None

    with pytest.raises(InvalidInputError, match="a stream"):
        OutlierSource(Stream("hfids/some", None, None), "blend")
    base = array_source(oracles.generator("one"))
    base.labels = np.zeros(12, np.int64)
    with pytest.raises(InvalidInputError, match="12 images of one class"):
        OutlierSource(base, "blend")
    assert len(OutlierSource(base.without_labels(), "blend")) == 12


def test_the_demo_tells_its_digits_from_their_outliers():
    from ebm_guard import EnergyClassifier, predict
    from ebm_guard.data.demo import demo_classifier

    classifier = EnergyClassifier(demo_classifier())

    def energy(source):
        rows = batches(source, classifier.preprocessing, batch_size=450)
        logits = np.asarray(predict(classifier, rows, source="x").logits, np.float64)
        return -np.logaddexp.reduce(logits, axis=1)

    base = open_source("demo:")
    inside = energy(base)
    for name in TRAINING_KINDS + GUARD_KINDS:
        outside = energy(OutlierSource(base, name))
        assert oracles.auroc(inside[:200].tolist(), outside[:200].tolist()) > 0.6, name
