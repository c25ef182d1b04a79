"""ONNX programs in ONNX Runtime: the same decisions as the guard in torch."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from export_cases import SCORES, Net, case, ensemble, fitted, inputs, labelled
from PIL import Image

import ebm_guard
from ebm_guard.data import batches, open_source
from ebm_guard.data.images import to_input
from ebm_guard.deploy import export, load_exported
from ebm_guard.errors import ArtifactError, InvalidInputError, UnsupportedModelError
from ebm_guard.gate import INVALID
from ebm_guard.model.loading import load_model

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="onnx, onnxscript and onnxruntime are the `onnx` extra")

NETS = Path(__file__).parents[1] / "examples" / "published_nets.py"


def agrees(program, guard, x, gap):
    """Decisions are equal but where the score is within ``gap`` of the cut; return how many."""
    found, decision = program(x), guard(x)
    near = (decision.score - decision.cut).abs() <= gap
    assert torch.equal(found.accept[~near], decision.accept[~near])
    assert torch.equal(found.status == INVALID, decision.status == INVALID)
    assert torch.equal(found.label, decision.label)
    torch.testing.assert_close(found.energy, decision.energy, rtol=0, atol=gap)
    torch.testing.assert_close(found.confidence, decision.confidence, rtol=0, atol=1e-4)
    return int(near.sum())


@pytest.mark.slow
def test_onnx_runtime_decides_like_the_guard(tmp_path):
    """All at once: a combined score, an isotonic curve, cuts by class, a certified rule."""
    from ebm_guard.ood import combine

    guard = fitted(
        score=combine("energy", "vim", "knn"), calibrator="isotonic", per_class=True, risk=0.35
    )
    path = tmp_path / "gate.onnx"
    export(guard, "onnx", path, example=inputs(256, 9, spread=2.0))
    program = load_exported(path)
    for n in (1, 5, 200):
        agrees(program, guard, inputs(n, n, spread=2.0), 1e-4)
    x = inputs(4)
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    assert (program(x).status == INVALID).tolist() == [False, True, True, False]
    assert program.facts["versions"]["opset"] >= 18
    # Damage and other files.
    content = path.read_bytes()
    for part in (content[:-1000], content[: len(content) // 2], b"\x08\x07"):
        path.write_bytes(part)
        with pytest.raises(ArtifactError):
            load_exported(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCORES, "relative", "tied", "dirichlet", "vector, risk"])
def test_every_case_in_onnx_runtime(name, tmp_path):
    guard = case(name)
    # Some scores refuse rows near the boundary, some those far out.
    x = torch.cat([inputs(86, seed, spread) for seed, spread in enumerate((0.2, 1.0, 5.0))])
    program = export(guard, "onnx", tmp_path / "g.onnx", example=x)
    parity = program.facts["parity"]
    # At most 2 % of the rows: the largest energy_scale is 180 times its cut, and tolerances are of
    # the largest score.
    assert parity["decisions_that_differ"] <= parity["near_the_cut"] <= 5
    assert 0 < parity["accepted"] < 256


@pytest.mark.slow
def test_an_ensemble_in_onnx_runtime(tmp_path):
    guard = fitted(ensemble("mixture"))
    program = export(guard, "onnx", tmp_path / "g.onnx", example=inputs(256, 9, spread=2.0))
    for n in (1, 2, 7, 64):
        agrees(program, guard, inputs(n, n, spread=2.0), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_models_of_other_precision(dtype, tmp_path):
    model = Net().to(dtype)
    guard = ebm_guard.wrap(model).fit([(x.to(dtype), y) for x, y in labelled(Net())])
    path, x = tmp_path / "g.onnx", inputs(256, 9, spread=2.0).to(dtype)
    if dtype == torch.bfloat16:
        with pytest.raises(
            UnsupportedModelError,
            match=r"cannot be run here .*bfloat16.* export the model in float32",
        ):
            export(guard, "onnx", path, example=x)
        assert list(tmp_path.iterdir()) == []
        return
    parity = export(guard, "onnx", path, example=x).facts["parity"]
    assert parity["decisions_that_differ"] <= parity["near_the_cut"]
    found, decision = load_exported(path)(x), guard(x)
    # In half precision the runtime rounds after each operation, and logits tie.
    far = (decision.score - decision.cut).abs() > (0.1 if dtype == torch.float16 else 1e-9)
    assert int(far.sum()) > 200
    assert torch.equal(found.accept[far], decision.accept[far])


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_graphs_are_valid_and_name_the_batch(opset, tmp_path):
    import onnx

    path = tmp_path / "g.onnx"
    export(fitted(score="knn", per_class=True), "onnx", path, opset=opset)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == opset
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        assert [axis.dim_param for axis in axes] == ["batch", *[""] * (len(axes) - 1)]


@pytest.mark.slow
def test_the_runtime_alone_is_enough(tmp_path):
    """Names, types and a free batch size, for whoever serves the file without ebm_guard."""
    path = tmp_path / "g.onnx"
    guard = fitted()
    export(guard, "onnx", path, opset=18)
    code = """
        import json, sys
        sys.modules["torch"] = None  # An import of it fails.
        import numpy as np, onnxruntime
        session = onnxruntime.InferenceSession(sys.argv[1])
        x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
        names = [item.name for item in session.get_outputs()]
        shapes = [list(value.shape) for value in session.run(None, {"input": x})]
        facts = json.loads(session.get_modelmeta().custom_metadata_map["ebm_guard"])
        x[1, 2] = np.nan
        accept, p_value = session.run(["accept", "p_value"], {"input": x})
        assert not accept[1] and p_value[1] == 0 and (p_value[[0, 2]] > 0).all()
        heavy = [name for name in ("torch", "ebm_guard") if sys.modules.get(name)]
        print(json.dumps([names, shapes, facts["versions"]["opset"], heavy]))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    names, shapes, opset, heavy = json.loads(found.stdout)
    assert names == ["logits", "probabilities", "energy", "score", "p_value", "accept"]
    assert shapes == [[3, 4], [3, 4], [3], [3], [3], [3]]
    assert opset == 18
    assert heavy == []
    with pytest.raises(InvalidInputError, match="18 or higher"):
        export(guard, "onnx", tmp_path / "other.onnx", opset=9)
    assert not (tmp_path / "other.onnx").exists()


def cifar10(data_dir, spec, preprocessing):
    source = open_source(f"npz:{data_dir / spec}")
    return [(b.inputs, b.labels) for b in batches(source, preprocessing, batch_size=250)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kind"), [("onnx", "model"), ("onnx", "pixels"), ("torch", "pixels")]
)
def test_resnet20_on_cifar10_and_textures(data_dir, form, kind, tmp_path):
    model = load_model(
        f"{NETS}:cifar10_resnet20", checkpoint=data_dir / "cifar10_resnet20.safetensors"
    )
    guard = ebm_guard.wrap(model)
    preprocessing = guard.classifier.preprocessing
    guard.fit(cifar10(data_dir, "cifar10_test.npz[:1000]", preprocessing))
    program = export(guard, form, tmp_path / "g", input=kind)
    near = rows = refused = 0
    for spec in ("cifar10_test.npz[1000:2500]", "dtd_1200_32x32.npz[:500]"):
        # The other programs are the same but for the normalisation: fewer rows.
        for inside, _ in cifar10(data_dir, spec, preprocessing)[: None if kind == "model" else 2]:
            x, eager = inside, guard
            if kind == "pixels":
                x, eager = preprocessing.denormalize(inside), guard.pixels
            sizes = (1, 2, 7, 64, len(x) - 74)
            for part in x.split(sizes):
                near += agrees(program, eager, part, 1e-3)
            rows += len(x)
            refused += int((~eager(x).accept).sum())
    assert rows == (2000 if kind == "model" else 1000)
    assert near <= 5
    assert 0.05 * rows < refused < 0.5 * rows


@pytest.mark.slow
def test_efficientnet_on_imagenet(data_dir, tmp_path):
    model = load_model(
        f"{NETS}:imagenet_tf_efficientnet_lite0",
        checkpoint=data_dir / "imagenet_tf_efficientnet_lite0_fp16.safetensors",
    )
    guard = ebm_guard.wrap(model)
    files = sorted((data_dir / "imagenet_sample").rglob("*.*"))[::5]
    rows = []
    for file in files[:60]:
        with Image.open(file) as image:
            rows.append(to_input(image.convert("RGB"), guard.classifier.preprocessing))
    x = torch.stack([torch.from_numpy(row) for row in rows])
    # The folders are in the order of the classes.
    labels = 5 * torch.arange(60)
    guard.fit([(x[:40], labels[:40])], false_reject_rate=0.2, threshold="marginal")
    program = export(guard, "onnx", tmp_path / "g.onnx", example=x)
    parity = program.facts["parity"]
    assert parity["rows"] == 256
    assert parity["decisions_that_differ"] <= parity["near_the_cut"] <= 2
    agrees(program, guard, x[40:], 1e-3)
