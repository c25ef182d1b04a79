"""Models that need a package or a device which CI lacks: Hugging Face, ONNX Runtime, a GPU.

``pip install transformers onnx onnxruntime onnxscript`` runs the first two.
"""

import warnings

import pytest
import torch
from foreign import CLASSES, convnet, images, keeps_its_promises, redrawn

import ebm_guard
from ebm_guard.errors import ArtifactError, UnsupportedModelError
from ebm_guard.model import EnergyClassifier

NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "elk"}
TRAIN_MODE = "ignore:the model is in train mode:ebm_guard.errors.EbmGuardWarning"


def needs(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: it is no dependency of ours")


def vit(transformers):
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        id2label=NAMES,
    )


def resnet(transformers):
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=NAMES
    )


def convnext(transformers):
    return transformers.ConvNextConfig(
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        layer_scale_init_value=0.5,
        id2label=NAMES,
    )


def from_hugging_face(config, **settings):
    transformers = needs("transformers")
    with torch.random.fork_rng(devices=[]):
        made = config(transformers)
        for name, value in settings.items():
            setattr(made, name, value)
        return transformers.AutoModelForImageClassification.from_config(made)


@pytest.mark.filterwarnings(TRAIN_MODE)
@pytest.mark.parametrize(
    ("config", "head"),
    [(vit, "classifier"), (resnet, "classifier.1"), (convnext, "classifier")],
)
@pytest.mark.parametrize("parallel", [False, True])
def test_hugging_face(config, head, parallel, tmp_path):
    model = redrawn(from_hugging_face(config))
    x = images(size=16)
    with torch.no_grad():
        expected = model(pixel_values=x).logits
    if parallel:
        model = torch.nn.DataParallel(model)
    model.train()
    guard = keeps_its_promises(model, x, expected, tmp_path / "g.safetensors", names=(head,))
    assert guard.classifier.classes == tuple(NAMES.values())
    assert guard.classifier.loss_note == "training loss unknown"


def test_hugging_face_multi_label_is_refused():
    model = from_hugging_face(vit, problem_type="multi_label_classification")
    for given in (model, torch.nn.DataParallel(model)):
        with pytest.raises(UnsupportedModelError, match="multi-label"):
            EnergyClassifier(given)


def session_of(model, x, path):
    """Export a model to ONNX and return a callable around an ONNX Runtime session."""
    onnxruntime = needs("onnxruntime")
    needs("onnx")
    needs("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        rows = torch.export.Dim("rows", min=2, max=512)
        torch.onnx.export(
            model,
            (x,),
            str(path),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: rows},),
            input_names=["x"],
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def classify(batch):
        return torch.from_numpy(session.run(None, {"x": batch.numpy()})[0])

    return classify


def test_onnx_runtime(tmp_path):
    plain, x = convnet(), images()
    run = session_of(plain, x, tmp_path / "model.onnx")
    expected = run(x)
    with torch.no_grad():
        assert torch.allclose(expected, plain(x), atol=1e-4)
    place = tmp_path / "g.safetensors"
    guard = keeps_its_promises(run, x, expected, place, message="not an nn.Module")
    assert guard.classifier.name == "classify"
    # A session of other weights is caught by the stored inputs.
    other = session_of(convnet(seed=6), x, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match="stored"):
        ebm_guard.Guard.load(place, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_model_on_a_gpu(tmp_path):
    """The batch comes from the CPU; the guard's buffers go where the model is."""
    model, x = convnet().cuda(), images()
    with torch.no_grad():
        expected = model(x.cuda())
    guard = ebm_guard.wrap(model)
    labels = expected.argmax(dim=1).cpu()
    labels[::4] = (labels[::4] + 1) % CLASSES
    guard.fit([(x, labels)], false_reject_rate=0.2, threshold="marginal")
    decision = guard(x)
    assert torch.equal(decision.logits, expected)
    guard.save(tmp_path / "g.safetensors")
    for place in (model, convnet()):
        again = ebm_guard.Guard.load(tmp_path / "g.safetensors", place)(x)
        assert torch.equal(again.label.cpu(), decision.label.cpu())
