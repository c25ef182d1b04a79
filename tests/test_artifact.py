"""The one-file artefact: whole or not at all, and never accepted for another model."""

import errno
import hashlib
import json
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Moody, inputs_of, linear, listing, logits_with, with_logits

import ebm_guard
from ebm_guard import Guard
from ebm_guard.errors import ArtifactError, DataError, EbmGuardError, EbmGuardWarning
from ebm_guard.gate.artifact import SCHEMA, read_artifact
from ebm_guard.registry import methods


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval()


def fitted(model, logits=None, **settings):
    guard = ebm_guard.wrap(model, logits=logits)
    dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32
    x = inputs_of(150, dtype=dtype)
    with torch.no_grad():
        labels = guard.classifier(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return guard.fit([(x, labels)], **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = net()
    guard = fitted(model)
    return guard.save(tmp_path_factory.mktemp("guard") / "guard.safetensors"), guard, model


def same(first, second):
    for name in ("status", "label", "confidence", "energy", "score", "p_value"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def refused(path, *words, model=None, **settings):
    with pytest.raises(ArtifactError) as caught:
        Guard.load(path, model, **settings)
    message = str(caught.value)
    assert Path(path).name in message
    for word in words:
        assert word in message
    assert caught.value.exit_code == 3


# --- round trip


@pytest.mark.parametrize("score", [method.name for method in methods("score")])
@pytest.mark.parametrize("threshold", ["pac", "marginal"])
def test_round_trip(score, threshold, tmp_path):
    model = net()
    guard = fitted(model, score=score, threshold=threshold, false_reject_rate=0.1)
    path = guard.save(tmp_path / "deep" / "guard.safetensors")
    again = Guard.load(path, model)
    x = inputs_of(60, seed=9) * 3
    same(again(x), guard(x))
    assert again.threshold.guarantee == guard.threshold.guarantee
    assert again.facts == guard.facts
    assert again.summary().splitlines()[:-1] == guard.summary().splitlines()[:-1]
    assert listing(tmp_path) == ["deep", "deep/guard.safetensors"]
    # What was loaded can be saved and loaded again.
    third = Guard.load(again.save(tmp_path / "again.safetensors"), model)
    same(third(x), guard(x))


def test_settings_of_a_score_are_kept(tmp_path):
    from ebm_guard.ood import GEN, Energy

    model = net()
    for score in (Energy(energy_temperature=3.0), GEN(gamma=0.5, top=2)):
        guard = fitted(model, score=score)
        again = Guard.load(guard.save(tmp_path / "guard.safetensors"), model)
        assert again.score.settings() == score.settings()
        same(again(inputs_of(9)), guard(inputs_of(9)))


def test_unlabelled_guard_round_trip(tmp_path):
    model = net()
    guard = ebm_guard.wrap(model)
    with pytest.warns(EbmGuardWarning, match="no labels"):
        guard.fit(inputs_of(100))
    again = Guard.load(guard.save(tmp_path / "guard.safetensors"), model)
    assert again.calibrator is None
    same(again(inputs_of(9)), guard(inputs_of(9)))


def test_one_readable_file_without_the_model(saved):
    path, _, model = saved
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        metadata = file.metadata()
    assert names == {
        "canary.inputs",
        "canary.logits",
        "calibrator.temperature",
        "threshold.cut",
        "threshold.scores",
    }
    manifest = json.loads(metadata["ebm_guard"])
    assert manifest["schema"] == SCHEMA
    assert manifest["model"]["weights_sha256"].startswith("sha256:")
    assert metadata["ebm_guard"] == json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    content = path.read_bytes()
    assert model[0].weight.detach().numpy().tobytes() not in content
    # As readable as any other file of this user.
    other = path.with_name("other")
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    other.unlink()


def test_the_guard_outlives_its_file(saved, tmp_path):
    path, guard, model = saved
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    again = Guard.load(copy, model)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    same(again(inputs_of(9)), guard(inputs_of(9)))


def test_without_a_model_decide_works(saved):
    path, guard, model = saved
    again = Guard.load(path)
    logits = model(inputs_of(20)).detach()
    same(again.decide(logits), guard.decide(logits))
    with pytest.raises(EbmGuardError, match=r"holds no model.*Guard\.load"):
        again(inputs_of(2))


def test_guard_of_stored_logits(tmp_path):
    guard = Guard().fit(logits_with(200, classes=3))
    path = guard.save(tmp_path / "guard.safetensors")
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    same(Guard.load(path).decide(logits), guard.decide(logits))
    refused(path, "weights none", "fit a new guard", model=net())


def function_of(model):
    def function(x):
        return model(x)

    return function


def test_a_plain_function(tmp_path):
    model = net()
    guard = fitted(function_of(model))
    path = guard.save(tmp_path / "guard.safetensors")
    same(Guard.load(path, function_of(model))(inputs_of(9)), guard(inputs_of(9)))
    refused(path, "canary", "code", "Fit a new guard", model=lambda x: model(x) * 1.01)
    refused(path, "weights none", "fit a new guard", model=model)


def test_canary_can_be_left_out(tmp_path):
    model = net()
    guard = fitted(model, canary=False)
    path = guard.save(tmp_path / "guard.safetensors")
    assert not [name for name in load_file(path) if "canary" in name]
    same(Guard.load(path, model)(inputs_of(9)), guard(inputs_of(9)))
    refused(path, "weights", model=net(seed=1))


# --- another model


def test_another_model(saved):
    path, *_ = saved
    refused(path, "weights sha256:", "Its threshold means nothing here", "fit a new", model=net(1))
    refused(path, "fit a new guard", model=linear())


def test_one_changed_weight(saved):
    path, _, model = saved
    changed = net()
    assert torch.equal(changed[0].weight, model[0].weight)
    with torch.no_grad():
        changed[0].weight[0, 0] = torch.nextafter(changed[0].weight[0, 0], torch.tensor(9.0))
    refused(path, "weights sha256:", "load the model it was fitted on", model=changed)


def test_changed_code(saved):
    path, *_ = saved
    changed = net()
    original = changed.forward
    changed.forward = lambda x: original(x) + 0.01
    refused(path, "right weights", "canary", "its code", "relative difference", model=changed)
    changed.forward = lambda x: original(x) * float("nan")
    refused(path, "canary", model=changed)


def test_changed_activation(saved):
    path, *_ = saved
    changed = net()
    changed[1] = nn.GELU().eval()
    refused(path, "right weights", "its code", model=changed)


def test_changed_logits_callable(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            z = self.net(x)
            return z, z.flip(1)

    model = Two().eval()
    guard = fitted(model, logits=lambda out: out[0])
    path = guard.save(tmp_path / "guard.safetensors")
    again = Guard.load(path, model, logits=lambda out: out[0])
    same(again(inputs_of(9)), guard(inputs_of(9)))
    refused(path, "`logits=` callable", model=model, logits=lambda out: out[1])


def test_another_number_of_classes(saved):
    path, *_ = saved
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    refused(path, "3 classes", "fit a new guard", model=other)

    # The same weights: only the canary can tell.
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def state_dict(self, *args, **kwargs):
            return self.net.state_dict(*args, **kwargs)

        def forward(self, x):
            return self.net(x).repeat(1, 2)

    refused(path, "3 classes", "has 6", model=Pairs().eval())


def test_another_dtype(saved):
    path, *_ = saved
    refused(path, "weights sha256:", model=net().double())

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def state_dict(self, *args, **kwargs):
            return self.net.state_dict(*args, **kwargs)

        def forward(self, x):
            return self.net(x).bfloat16()

    refused(path, "float32 logits", "bfloat16", "same dtype", model=Half().eval())


def test_half_precision_model_round_trip(tmp_path):
    model = net(dtype=torch.bfloat16)
    guard = fitted(model)
    path = guard.save(tmp_path / "guard.safetensors")
    x = inputs_of(9, dtype=torch.bfloat16)
    same(Guard.load(path, model)(x), guard(x))
    assert guard.facts["dtype"] == "bfloat16"
    refused(path, "weights sha256:", model=net())


def test_a_model_that_cannot_run_on_the_inputs(saved):
    path, *_ = saved
    changed = net()
    original = changed.forward
    changed.forward = lambda x: original(x[:, :3])
    refused(path, "cannot run", "mat1 and mat2", "another model", model=changed)


def test_a_model_that_gives_no_logits_any_more(saved):
    path, *_ = saved
    changed = net()
    original = changed.forward
    for wrong in (lambda x: (original(x), 1), lambda x: original(x)[:, :1]):
        changed.forward = wrong
        with pytest.raises(EbmGuardError, match="logits"):
            Guard.load(path, changed)


def test_wrappers_are_the_same_model(saved):
    path, guard, model = saved
    expected = guard(inputs_of(9))
    for wrapper in (
        nn.DataParallel(model),
        torch.compile(model, backend="eager"),
        nn.DataParallel(torch.compile(model, backend="eager")),
    ):
        same(Guard.load(path, wrapper.eval())(inputs_of(9)), expected)


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_train_mode_is_the_same_model(tmp_path):
    guard = fitted(Moody().eval())
    path = guard.save(tmp_path / "guard.safetensors")
    model = Moody().train()
    same(Guard.load(path, model)(inputs_of(9)), guard(inputs_of(9)))
    assert model.training


def test_output_object_may_change_when_logits_do_not(saved):
    path, guard, _ = saved
    changed = net()
    original = changed.forward
    changed.forward = lambda x: with_logits(original(x))
    same(Guard.load(path, changed)(inputs_of(9)), guard(inputs_of(9)))


# --- damaged and edited files


def content_of(path):
    tensors, manifest = read_artifact(path)
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, manifest


def test_every_flipped_byte_is_noticed(saved, tmp_path, capsys):
    path, _, model = saved
    good = path.read_bytes()
    whole = content_of(path)
    generator = random.Random(0)
    header = int.from_bytes(good[:8], "little") + 8
    places = sorted(
        {
            *range(16),
            *generator.sample(range(header), 500),
            *generator.sample(range(len(good)), 300),
        }
    )
    copy = tmp_path / "flipped.safetensors"
    tried = refusals = 0
    for place in places:
        for bit in (1 << generator.randrange(8), generator.randrange(1, 256)):
            content = bytearray(good)
            content[place] ^= bit
            copy.write_bytes(content)
            tried += 1
            try:
                Guard.load(copy, model)
            except ArtifactError:
                refusals += 1
            else:
                # Blanks after the header may change; what is read may not.
                assert content_of(copy) == whole, f"byte {place} ^ {bit} was accepted"
    with capsys.disabled():
        print(f"\n[fuzz] {tried} artefacts with one changed byte, {refusals} refused", end="")
    assert refusals > 0.98 * tried
    assert listing(tmp_path) == ["flipped.safetensors"]


def test_every_truncation_is_noticed(saved, tmp_path, capsys):
    path, _, model = saved
    good = path.read_bytes()
    lengths = sorted({*range(0, len(good), 37), *range(12), *range(len(good) - 12, len(good))})
    copy = tmp_path / "short.safetensors"
    for length in lengths:
        copy.write_bytes(good[:length])
        refused(copy, "damaged or not a guard artefact", "save the guard again", model=model)
    copy.write_bytes(good + b"\0" * 8)
    refused(copy, "damaged", model=model)
    with capsys.disabled():
        print(f"\n[fuzz] {len(lengths)} truncated artefacts, all refused", end="")


def edited(path, copy, change, *, rehash=False):
    """Write a copy with a changed manifest or changed tensors."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["ebm_guard"])
    manifest = change(manifest, tensors) or manifest
    metadata["ebm_guard"] = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    if rehash:
        digest = hashlib.sha256(metadata["ebm_guard"].encode())
        for name in sorted(tensors):
            value = tensors[name]
            digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        metadata["sha256"] = digest.hexdigest()
    save_file(tensors, copy, metadata=metadata)
    return copy


def test_the_same_edit_without_a_change_is_accepted(saved, tmp_path):
    path, guard, model = saved
    copy = edited(path, tmp_path / "copy.safetensors", lambda manifest, tensors: None, rehash=True)
    same(Guard.load(copy, model)(inputs_of(9)), guard(inputs_of(9)))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, tensors: manifest["threshold"].update(false_reject_rate=0.5),
        lambda manifest, tensors: manifest.update(guarantee="all is well"),
        lambda manifest, tensors: manifest["model"].update(weights_sha256=None),
        lambda manifest, tensors: manifest.update(more=1),
        lambda manifest, tensors: tensors["threshold.cut"].fill_(99.0),
        lambda manifest, tensors: tensors.pop("canary.inputs") is None,
        lambda manifest, tensors: tensors.update(more=torch.zeros(1)),
        lambda manifest, tensors: tensors.update(
            {"threshold.scores": tensors["threshold.scores"].float()}
        ),
    ],
)
def test_edits_are_noticed(saved, tmp_path, change):
    def only(manifest, tensors):
        change(manifest, tensors)

    copy = edited(saved[0], tmp_path / "copy.safetensors", only)
    refused(copy, "changed after it was saved", "hash", "Fit and save the guard again")


def test_another_schema(saved, tmp_path):
    def newer(manifest, tensors):
        manifest["schema"] = "ebm_guard.artifact/99"

    copy = edited(saved[0], tmp_path / "copy.safetensors", newer, rehash=True)
    refused(copy, "ebm_guard.artifact/99", SCHEMA, "Fit the guard again")


@pytest.mark.parametrize(
    "key", ["model", "score", "calibrator", "threshold", "preprocessing", "canary", "facts"]
)
@pytest.mark.parametrize("value", ["gone", None, [], 3, {}])
def test_a_forged_manifest_fails_cleanly(saved, tmp_path, key, value):
    """The hash is no signature: who recomputes it may confuse us, but not crash us."""

    def change(manifest, tensors):
        if value == "gone":
            del manifest[key]
        else:
            manifest[key] = value

    copy = edited(saved[0], tmp_path / "copy.safetensors", change, rehash=True)
    nullable = value is None and key in ("calibrator", "preprocessing", "canary")
    if nullable:
        assert Guard.load(copy, saved[2]).threshold is not None
    else:
        refused(copy, "fit the guard again", model=saved[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, tensors: manifest["threshold"].update(rank=10_000),
        lambda manifest, tensors: tensors.update({"threshold.cut": torch.zeros(2)}),
        lambda manifest, tensors: manifest["score"].update(name="enrgy"),
        lambda manifest, tensors: manifest["score"].update(settings={"wrong": 1}),
        lambda manifest, tensors: manifest["calibrator"].update(name="none"),
        lambda manifest, tensors: tensors.update({"calibrator.temperature": torch.zeros(3)}),
    ],
)
def test_forged_values_fail_cleanly(saved, tmp_path, change):
    def only(manifest, tensors):
        change(manifest, tensors)

    copy = edited(saved[0], tmp_path / "copy.safetensors", only, rehash=True)
    refused(copy, "fit the guard again", model=saved[2])


@pytest.mark.parametrize("manifest", ["null", "[]", "3", '"text"', "{}", "{"])
def test_a_manifest_that_is_no_object(tmp_path, manifest):
    path = tmp_path / "guard.safetensors"
    tensors = {"a": torch.zeros(1)}
    digest = hashlib.sha256(manifest.encode())
    digest.update(b"|a|torch.float32|(1,)|" + bytes(4))
    save_file(tensors, path, metadata={"ebm_guard": manifest, "sha256": digest.hexdigest()})
    refused(path)


def test_files_that_are_no_artefact(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, weights)
    refused(weights, "not a guard", "no manifest", "--checkpoint", "ebm-guard fit")
    for name, content in {"empty": b"", "text": b"hello, world", "zip": b"PK\x03\x04" * 9}.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(path, "damaged or not a guard artefact")
    refused(tmp_path, "not a file", "guard.save")
    refused(tmp_path / "missing.safetensors", "not a file", "guard.save")


# --- places that cannot be written


def full_disk(monkeypatch):
    """Every write of bytes stops half-way, as on a full disk."""
    write = Path.write_bytes

    def stops(self, data):
        write(self, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", stops)


def test_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    guard = saved[1]
    full_disk(monkeypatch)
    with pytest.raises(DataError) as caught:
        guard.save(tmp_path / "guard.safetensors")
    message = str(caught.value)
    assert "No space left on device" in message
    assert "nothing was written" in message
    assert "choose another --output" in message
    assert caught.value.exit_code == 3
    assert listing(tmp_path) == []


def test_full_disk_keeps_the_older_file(saved, tmp_path, monkeypatch):
    _, guard, model = saved
    path = guard.save(tmp_path / "guard.safetensors")
    before = path.read_bytes()
    full_disk(monkeypatch)
    with pytest.raises(DataError, match="No space left"):
        fitted(net(seed=4)).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["guard.safetensors"]
    same(Guard.load(path, model)(inputs_of(9)), guard(inputs_of(9)))


def test_interruption_leaves_nothing(saved, tmp_path, monkeypatch):
    def interrupted(self, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved[1].save(tmp_path / "guard.safetensors")
    assert listing(tmp_path) == []


def test_overwriting_replaces_the_file(saved, tmp_path):
    path = saved[1].save(tmp_path / "guard.safetensors")
    other = net(seed=4)
    fitted(other).save(path)
    assert Guard.load(path, other).threshold is not None
    refused(path, "weights", model=saved[2])


def test_a_folder_or_a_file_in_the_way(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "guard.safetensors", tmp_path / "folder"):
        with pytest.raises(DataError, match="cannot write"):
            saved[1].save(place)
    assert listing(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_read_only_file_system(saved, tmp_path, monkeypatch):
    """Simulated, because root may write into read-only folders."""

    def refuses(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "touch", refuses)
    monkeypatch.setattr(Path, "write_bytes", refuses)
    with pytest.raises(DataError, match=r"cannot write .*Read-only file system.*writable folder"):
        saved[1].save(tmp_path / "guard.safetensors")
    assert listing(tmp_path) == []
