"""Malformed tensors and artefacts: an error with a message, or a decision that accepts nothing bad.

The number of inputs that were tried is printed.
"""

import hashlib
import json
import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_gate_rules import confident_rows, predicted_rows
from test_guard_scores import net, rows_of

import ebm_guard
from ebm_guard import Guard, predict
from ebm_guard.errors import ArtifactError, EbmGuardError
from ebm_guard.gate import INVALID, DriftMonitor


def model_rows(seed, n):
    return predict(ebm_guard.EnergyClassifier(net()), rows_of(net(), n, seed), features=True)


@pytest.fixture(scope="module")
def guards(tmp_path_factory):
    """One guard of each form, with its file: (guard, path, classes, width of the features)."""
    folder = tmp_path_factory.mktemp("guards")
    train, rows = model_rows(2, 300), model_rows(3, 300)
    made = {
        "energy": (Guard().fit(rows), 3, None),
        "vector": (Guard().fit(rows, calibrator="vector"), 3, None),
        "class": (Guard().fit(predicted_rows(), per_class=True, simultaneous=True), 4, None),
        "rule": (Guard().fit(confident_rows(), risk=0.1), 5, None),
        "knn": (Guard().fit(rows, fit_data=train, score="knn"), 3, 12),
        "vim": (Guard().fit(rows, fit_data=train, score="vim"), 3, 12),
        "combine": (Guard().fit(rows, fit_data=train, score="combine"), 3, 12),
        "live": (ebm_guard.wrap(net()).fit(rows_of(net(), 200, 3)), 3, None),
    }
    return {
        name: (guard, guard.save(folder / name), classes, width)
        for name, (guard, classes, width) in made.items()
    }


# --- tensors

VALUES = (0.0, -0.0, 1e-45, 1e30, -1e30, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf, 65504.0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def odd_tensor(rng, rows, width):
    """Mostly of the right shape, with odd values; sometimes of another shape, type or kind."""
    dtype = DTYPES[rng.integers(len(DTYPES))]
    values = torch.from_numpy(rng.normal(0, 10 ** rng.uniform(-2, 3), size=(rows, width)))
    for _ in range(rng.integers(0, 6) if rows and width else 0):
        values[rng.integers(rows), rng.integers(width)] = VALUES[rng.integers(len(VALUES))]
    tensor = values.to(dtype)
    way = rng.integers(14)
    changes = {
        0: lambda: tensor[:, :-1],
        1: lambda: torch.cat([tensor, tensor[:, :1]], dim=1),
        2: lambda: tensor[0] if rows else tensor,
        3: lambda: tensor[None],
        4: lambda: tensor.nan_to_num(0, 0, 0).long(),
        5: lambda: tensor.double() + 1j,
        6: values.tolist,
        7: values.numpy,
        8: lambda: tensor.T.contiguous().T,
        9: lambda: tensor.nan_to_num() > 0,
    }
    return changes[way]() if way in changes else tensor


def check_decision(guard, logits, features, decision):
    for name in ("status", "label", "confidence", "p_value", "certified", "cut"):
        assert len(getattr(decision, name)) == len(logits)
    assert not torch.isnan(decision.confidence).any()
    accepted = decision.accept
    bad = ~torch.isfinite(logits).all(dim=1) | ~torch.isfinite(decision.score)
    if features is not None:
        bad |= ~torch.isfinite(features).all(dim=1)
    assert (decision.status[bad] == INVALID).all()
    assert (decision.status[~bad] != INVALID).all()
    assert (decision.score[accepted] <= decision.cut[accepted]).all()
    assert (decision.p_value[bad] == 0).all()
    if guard.rule is not None:
        inside = guard.rule.accept(decision.confidence, decision.score)
        assert inside[accepted].all()
    assert all((text == "") == ok for text, ok in zip(decision.reason, accepted, strict=True))
    json.dumps(decision.rows(), allow_nan=False)


def decided_or_refused(guard, logits, features):
    try:
        return guard.decide(logits, features), ""
    except EbmGuardError as error:
        return None, str(error)


@pytest.mark.parametrize("tries", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_malformed_tensors(guards, tries, capsys):
    rng = oracles.generator("tensors", tries)
    decided = refused = 0
    for guard, _, classes, width in guards.values():
        for _ in range(tries):
            rows = int(rng.integers(0, 6))
            logits = odd_tensor(rng, rows, classes)
            # Features may come although the score needs none, and be missing although it does.
            given = rng.random() < (0.9 if width else 0.2)
            features = odd_tensor(rng, rows, width or 7) if given else None
            found, message = decided_or_refused(guard, logits, features)
            if found is None:
                assert len(message) > 20
                refused += 1
            else:
                check_decision(guard, logits, features, found)
                decided += 1
    assert decided > tries
    assert refused > tries
    with capsys.disabled():
        print(f"\n[fuzz] {decided + refused} malformed batches: {decided} decided, "
              f"{refused} refused with a message.", end="")  # fmt: skip


# --- artefacts


def only_artifact_errors(path):
    """Load; return the guard or None. Any other error fails the test."""
    try:
        return Guard.load(path)
    except ArtifactError as error:
        message = str(error)
    assert path.name in message
    return None


@pytest.mark.parametrize("tries", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_artefacts_are_all_refused(guards, tries, tmp_path, capsys):
    rng = oracles.generator("damage", tries)
    total = 0
    for name, (_, path, _, _) in guards.items():
        content = path.read_bytes()
        target = tmp_path / name
        for _ in range(tries):
            damaged = bytearray(content)
            way = rng.integers(4)
            if way == 0:
                damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
            elif way == 1:
                damaged = damaged[: rng.integers(len(damaged))]
            elif way == 2:
                start = int(rng.integers(len(damaged)))
                damaged[start : start + 16] = rng.bytes(16)
            else:
                damaged += rng.bytes(int(rng.integers(1, 9)))
            if bytes(damaged) == content:
                continue
            target.write_bytes(damaged)
            assert only_artifact_errors(target) is None
            total += 1
    with capsys.disabled():
        print(f"\n[fuzz] {total} damaged artefacts, all refused.", end="")


def rewritten(path, target, tensors, manifest, rehash):
    """Write tensors and a manifest, with a hash that fits or with the old one."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["ebm_guard"] = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    if rehash:
        digest = hashlib.sha256(metadata["ebm_guard"].encode())
        for name in sorted(tensors):
            value = tensors[name]
            digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.numpy().tobytes())
        metadata["sha256"] = digest.hexdigest()
    target.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))
    return target


def swapped(tensors):
    """Every pair of tensors of one shape and type, exchanged."""
    names = sorted(tensors)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            first, second = tensors[one], tensors[other]
            if (
                first.shape == second.shape
                and first.dtype == second.dtype
                and not torch.equal(first, second)
            ):
                yield {**tensors, one: second, other: first}


def test_swapped_tensors_and_other_schemas_are_refused(guards, tmp_path, capsys):
    total = 0
    for _, path, _, _ in guards.values():
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            manifest = json.loads(file.metadata()["ebm_guard"])
        for changed in swapped(tensors):
            target = rewritten(path, tmp_path / "swap", changed, manifest, rehash=False)
            assert only_artifact_errors(target) is None
            total += 1
        for schema in ("ebm_guard.artifact/0", "ebm_guard.artifact/3", "", None, 2, [], {}):
            target = rewritten(
                path, tmp_path / "schema", tensors, {**manifest, "schema": schema}, rehash=True
            )
            assert only_artifact_errors(target) is None
            total += 1
    assert total > 50
    with capsys.disabled():
        print(f"\n[fuzz] {total} artefacts with swapped tensors or another schema, all refused.",
              end="")  # fmt: skip


ODD = (None, -1, 0, 7, 1e9, "", "x", [], {}, True, [1, 2, 3], 0.5)


def odd_manifest(rng, value):
    """Replace or drop one value somewhere in a JSON tree."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = sorted(value)[rng.integers(len(value))]
        if rng.random() < 0.2:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: odd_manifest(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = int(rng.integers(len(value)))
        return [*value[:place], odd_manifest(rng, value[place]), *value[place + 1 :]]
    return ODD[rng.integers(len(ODD))]


def odd_tensors(rng, tensors):
    if not tensors:
        return tensors
    name = sorted(tensors)[rng.integers(len(tensors))]
    value = tensors[name]
    changed = {
        1: value.flatten()[: max(1, value.numel() // 2)].clone,
        2: lambda: torch.full_like(value, 10**6),
        3: lambda: value[..., None],
        4: lambda: value.float() if value.dtype != torch.float32 else value.double(),
        5: lambda: value[:0].clone() if value.ndim else value,
        6: lambda: torch.full_like(value, math.nan) if value.is_floating_point() else -value,
        7: lambda: value.flip(0) if value.ndim else -value,
    }.get(int(rng.integers(8)), lambda: None)()
    rest = {key: item for key, item in tensors.items() if key != name}
    return rest if changed is None else {**rest, name: changed}


@pytest.mark.parametrize("tries", [80, pytest.param(600, marks=pytest.mark.slow)])
def test_forged_artefacts_never_crash(guards, tries, tmp_path, capsys):
    """With the hash made anew: no proof of origin, but no crash and no accepted NaN either."""
    rng = oracles.generator("forged", tries)
    refused = loaded = 0
    for _, path, classes, width in guards.values():
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            manifest = json.loads(file.metadata()["ebm_guard"])
        logits = torch.from_numpy(rng.normal(0, 5, size=(8, classes))).float()
        logits[3, 1], logits[4, 0] = math.nan, math.inf
        features = None if width is None else torch.from_numpy(rng.random((8, width))).float()
        for _ in range(tries):
            both = rng.integers(3)
            forged = odd_manifest(rng, manifest) if both != 0 else manifest
            changed = odd_tensors(rng, tensors) if both != 1 else tensors
            if not isinstance(forged, dict):
                continue
            target = rewritten(path, tmp_path / "forged", changed, forged, rehash=True)
            guard = only_artifact_errors(target)
            if guard is None:
                refused += 1
                continue
            loaded += 1
            found, _ = decided_or_refused(guard, logits, features)
            if found is None:
                continue
            assert (found.status[3:5] == INVALID).all()
            assert guard.summary()
    assert refused > loaded > 0
    with capsys.disabled():
        print(f"\n[fuzz] {refused + loaded} forged artefacts: {refused} refused, {loaded} sound.",
              end="")  # fmt: skip


@pytest.mark.parametrize("tries", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_monitors_are_refused(guards, tries, tmp_path, capsys):
    rng = oracles.generator("monitors", tries)
    path = guards["energy"][0].drift_monitor().save(tmp_path / "monitor")
    assert DriftMonitor.load(path).state.n == 0
    content = path.read_bytes()
    for _ in range(tries):
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            DriftMonitor.load(path)
    with capsys.disabled():
        print(f"\n[fuzz] {tries} damaged drift monitors, all refused.", end="")


def test_a_file_of_the_other_kind_is_named(guards, tmp_path):
    guard, path, _, _ = guards["energy"]
    monitor = guard.drift_monitor().save(tmp_path / "monitor")
    with pytest.raises(ArtifactError, match="is not a drift monitor that this version reads"):
        DriftMonitor.load(path)
    with pytest.raises(ArtifactError, match="is not a guard that this version reads"):
        Guard.load(monitor)


def test_inputs_that_are_no_batch_of_the_model(guards):
    """What the model itself refuses passes through; what it takes is decided or refused."""
    guard = guards["live"][0]
    for x in (torch.zeros(0, 4), torch.full((2, 4), math.nan), torch.full((2, 4), 3e38)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = guard(x)
        assert not found.accept[~torch.isfinite(found.logits).all(dim=1)].any()
        assert len(found) == len(x)
    with pytest.raises(RuntimeError):
        guard(torch.zeros(2, 5))
    assert np.isfinite(float(guard.threshold.cut))
