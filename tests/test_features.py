"""Feature networks against Hugging Face's own embeddings."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from faces_world import SIZE, build_arcface
from networks import PREPROCESSOR, build_clip, build_dino
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, Dinov2Model

from fairness_dft.faces.realism import NETWORK, FaceEmbedding, FaceRealism
from fairness_dft.features import Clip, Dino, FeatureNet

TEXTS = ["a chef", "", "a portrait of an old violinist, a person"]  # the last is longer than what the tower reads


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[type[FeatureNet], Path]:
    builders = {Clip: build_clip, Dino: build_dino}
    return {kind: build(tmp_path_factory.mktemp(kind.__name__)) for kind, build in builders.items()}


@pytest.fixture(params=[Clip, Dino])
def network(request: pytest.FixtureRequest, folders: dict[type[FeatureNet], Path]) -> FeatureNet:
    network = request.param(str(folders[request.param]))
    network.load()
    return network


def prepared(images: Tensor) -> Tensor:
    mean, deviation = torch.tensor(PREPROCESSOR["image_mean"]), torch.tensor(PREPROCESSOR["image_std"])
    return (images - mean[:, None, None]) / deviation[:, None, None]


def loaded_clip(folders: dict[type[FeatureNet], Path]) -> Clip:
    clip = Clip(str(folders[Clip]))
    clip.load()
    return clip


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 5, 7), (4, 3, 33, 20)])
def test_embeddings_have_unit_length(network: FeatureNet, shape: tuple[int, ...]) -> None:
    embeddings = network(torch.rand(shape))
    assert embeddings.shape == (shape[0], 12 if isinstance(network, Clip) else 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(shape[0]))


def test_embeddings_keep_the_precision_of_the_images_under_autocast(network: FeatureNet) -> None:
    images = torch.rand(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(images)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.norm(dim=1), torch.ones(3))  # a rounded one is off by some thousandths
    assert bool(((rounded * network(images)).sum(1) > 0.99).all())


def test_gradients_reach_the_images_and_no_weight(network: FeatureNet) -> None:
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    reference = network(torch.rand(2, 3, 20, 20)).detach()
    (network(images) * reference).sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_gradients_are_those_of_finite_differences(network: FeatureNet) -> None:
    network.double()
    images = torch.rand(1, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, images, fast_mode=True)


def test_training_mode_does_not_reach_the_network(network: FeatureNet) -> None:
    torch.nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())


def test_loading_twice_does_nothing(network: FeatureNet) -> None:
    inner = network.network
    network.load()
    assert network.network is inner


def test_clip_embeds_images_as_hugging_face_does(folders: dict[type[FeatureNet], Path]) -> None:
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folders[Clip]).eval().get_image_features(prepared(images))
    expected = normalize(getattr(features, "pooler_output", features), dim=-1)
    torch.testing.assert_close(loaded_clip(folders)(images), expected)


def test_clip_embeds_texts_as_hugging_face_does(folders: dict[type[FeatureNet], Path]) -> None:
    clip = loaded_clip(folders)
    tokens = clip.tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folders[Clip]).eval().get_text_features(**tokens)
    expected = normalize(getattr(features, "pooler_output", features), dim=-1)
    embeddings = clip.embed_text(TEXTS)
    torch.testing.assert_close(embeddings, expected)
    assert not embeddings.requires_grad
    assert (embeddings @ embeddings.T).triu(1).max() < 0.999  # the texts are told apart


def test_a_text_is_embedded_alike_alone_and_among_others(folders: dict[type[FeatureNet], Path]) -> None:
    clip = loaded_clip(folders)
    alone = torch.cat([clip.embed_text([text]) for text in TEXTS])
    torch.testing.assert_close(clip.embed_text(TEXTS), alone)


def test_dino_is_the_class_token(folders: dict[type[FeatureNet], Path]) -> None:
    images = torch.rand(3, 3, 16, 16)
    dino = Dino(str(folders[Dino]))
    dino.load()
    with torch.no_grad():
        output = Dinov2Model.from_pretrained(folders[Dino]).eval()(prepared(images))
    torch.testing.assert_close(dino(images), normalize(output.last_hidden_state[:, 0], dim=-1))
    torch.testing.assert_close(dino(images), normalize(output.pooler_output, dim=-1))


@pytest.mark.parametrize("kind", [Clip, Dino])
@pytest.mark.parametrize("path", ["no/such/folder", "nobody/such-a-network-is-nowhere"])
def test_a_network_that_is_nowhere_is_one_clear_line_at_once(
    kind: type[FeatureNet], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_network(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    message = rf"the feature network '{path}' could not be loaded \(.+\): give .* --config \S+portraits.yaml"
    with pytest.raises(ValueError, match=message) as caught:
        kind(path).load()
    assert "\n" not in str(caught.value)
    assert len(asked) == 1  # the hub's own retries would take minutes


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (Dino, "preprocessor_config.json"),
        (Dino, "model.safetensors"),
        (Dino, "config.json"),
        (Clip, "preprocessor_config.json"),
        (Clip, "model.safetensors"),
        (Clip, "tokenizer.json"),
    ],
)
def test_a_missing_file_is_one_clear_line(
    kind: type[FeatureNet], file: str, folders: dict[type[FeatureNet], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "network"))
    (folder / file).unlink()
    network = kind(str(folder))
    with pytest.raises(ValueError, match=r"the feature network '.*' could not be loaded \(.+\): give"):
        network.load()
    assert not hasattr(network, "network")  # a second try does not find it half loaded


@pytest.fixture(scope="module")
def arcface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_arcface(tmp_path_factory.mktemp("arcface") / "arcface.onnx")


def insightface_embeddings(file: Path, pictures: Tensor) -> Tensor:
    """What insightface's own class says of uint8 pictures with shape (N, 3, H, W), with unit length."""
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    found = ArcFaceONNX(str(file)).get_feat([p.flip(0).permute(1, 2, 0).contiguous().numpy() for p in pictures])
    return normalize(torch.from_numpy(found), dim=1)


@pytest.mark.parametrize("normalizes", [False, True])
def test_face_embeddings_are_those_of_insightface(arcface: Path, tmp_path: Path, normalizes: bool) -> None:
    file = arcface
    if normalizes:  # as mxnet exported: the network itself takes 127.5 off and divides
        import onnx

        model, file = onnx.load(arcface), tmp_path / "normalizes.onnx"
        for name, value in (("shift", 127.5), ("factor", 1 / 127.5)):
            model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [value]))
        model.graph.node[0].input[0] = "prepared"
        steps = [("Mul", ["minus", "factor"], "prepared", "_mul0"), ("Sub", ["input.1", "shift"], "minus", "_minus0")]
        for operator, inputs, output, name in steps:
            model.graph.node.insert(0, onnx.helper.make_node(operator, inputs, [output], name=name))
        onnx.save(model, file)
    embedding = FaceEmbedding(str(file))
    embedding.load()
    pictures = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    found = embedding(pictures.float() / 255)
    torch.testing.assert_close(found, insightface_embeddings(file, pictures), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_face_embedding_passes_gradients_from_the_aligned_face_to_the_image(arcface: Path) -> None:
    embedding = FaceEmbedding(str(arcface))
    embedding.load()
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    landmarks = torch.tensor([[12.0, 15], [26, 15], [19, 22], [14, 30], [24, 30]]).expand(2, 5, 2)
    faces = embedding.align(images, landmarks)
    assert faces.shape == (2, 3, SIZE, SIZE)
    embedding(faces)[:, 0].sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert not any(parameter.requires_grad for parameter in embedding.parameters())


def test_face_realism_loads_the_bank_of_its_own_network_alone(arcface: Path, tmp_path: Path) -> None:
    other = build_arcface(tmp_path / "other.onnx", seed=1)  # embeddings of the same width
    digest = hashlib.sha256(arcface.read_bytes()).hexdigest()
    for name, tensor, made_with in (
        ("good", torch.ones(2, 8), digest),
        ("other", torch.ones(2, 8), hashlib.sha256(other.read_bytes()).hexdigest()),
        ("unknown", torch.ones(2, 8), "?"),
        ("empty", torch.zeros(0, 8), digest),
        ("wide", torch.ones(2, 9), digest),
        ("flat", torch.ones(8), digest),
    ):
        save_file({"embeddings": tensor}, tmp_path / f"{name}.safetensors", metadata={NETWORK: made_with})
        realism = FaceRealism(str(tmp_path / f"{name}.safetensors"), FaceEmbedding(str(arcface)))
        if name == "good":
            realism.load()
            torch.testing.assert_close(realism.bank.norm(dim=1), torch.ones(2))
            assert not realism.bank.requires_grad
        else:
            with pytest.raises(
                ValueError, match="was not made with the face network .*: give a bank of real faces, made with"
            ):
                realism.load()
    save_file({"faces": torch.ones(2, 8)}, tmp_path / "tensors.safetensors")
    (tmp_path / "bytes.safetensors").write_bytes(b"no tensors")
    for name in ("tensors", "bytes"):
        with pytest.raises(ValueError, match="it is not a face bank.*: give a bank of real faces, made with"):
            FaceRealism(str(tmp_path / f"{name}.safetensors"), FaceEmbedding(str(arcface))).load()


def test_face_realism_tells_what_is_missing(arcface: Path) -> None:
    for settings, message in (
        ({"confidence": 2}, "`confidence` must be"),
        ({"weight": -1}, "`weight` must not be neg"),
    ):
        with pytest.raises(ValueError, match=message):
            FaceRealism("bank", **settings)
    with pytest.raises(
        ValueError, match=r"bank 'missing.safetensors' could not be loaded .*give a bank of real faces, made"
    ):
        FaceRealism("missing.safetensors", FaceEmbedding(str(arcface))).check()
    with pytest.raises(
        ValueError, match=r"network 'no/such/arcface.onnx' could not be loaded .*insightface downloads its"
    ):
        FaceEmbedding("no/such/arcface.onnx").load()


def test_face_embedding_refuses_other_networks(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 28, 28]) for n in "ab"]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "gray.onnx")
    with pytest.raises(ValueError, match=r"must read square color images, but its input is \[1, 1, 28, 28\]"):
        FaceEmbedding(str(tmp_path / "gray.onnx")).load()
    for output, shape, message in (
        ("b", [2, 3, 28, 28], "must give one embedding per face"),
        ("c", None, "could not be loaded"),
    ):
        values = [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 3, 28, 28]),
            helper.make_tensor_value_info(output, TensorProto.FLOAT, shape),
        ]
        node = (
            helper.make_node("Relu", ["a"], ["b"]) if output == "b" else helper.make_node("MatMul", ["a", "w"], ["c"])
        )
        weight = helper.make_tensor("w", TensorProto.FLOAT, [5, 2], [0.0] * 10)
        graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
        onnx.save(helper.make_model(graph), tmp_path / "odd.onnx")
        with pytest.raises(ValueError, match=message):
            FaceEmbedding(str(tmp_path / "odd.onnx")).load()
