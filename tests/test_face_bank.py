"""The command that makes a bank of faces, on drawn ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faces_world import SIZE, build_arcface, save_pictures
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from fairness_dft.face_bank import main
from fairness_dft.faces.detectors import InsightFace
from fairness_dft.faces.realism import FaceEmbedding, FaceRealism
from fairness_dft.portraits.world import DATA

DETECTOR = f"""--faces.detectors=[{{"class_path": "fairness_dft.faces.InsightFace",
 "init_args": {{"name": "{DATA / "detector"}", "size": [64, 64]}}}}]"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_arcface(tmp_path_factory.mktemp("arcface") / "arcface.onnx"))


def test_bank_holds_insightfaces_embedding_of_every_face(
    tmp_path: Path, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    present = save_pictures(tmp_path / "pictures" / "deeper", 12)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture either")
    output = tmp_path / "new" / "bank.safetensors"
    main([f"--images={tmp_path / 'pictures'}", f"--output={output}", f"--embedding.path={network}", DETECTOR])
    bank = load_file(output)["embeddings"]
    assert bank.shape == (sum(present), 8) and bank.dtype == torch.float32 and 0 < sum(present) < 12
    assert_close(bank.norm(dim=1), torch.ones(len(bank)))
    said = capsys.readouterr().out
    assert f"{sum(present)} faces in {output}; {13 - sum(present)} of 13 files show no face" in said

    detector, embedding = InsightFace(str(DATA / "detector"), size=(64, 64)), FaceEmbedding(network)
    detector.load()
    embedding.load()
    FaceRealism(str(output), FaceEmbedding(network)).load()  # takes it as its own
    first = next(
        file for file, face in zip(sorted((tmp_path / "pictures").rglob("*.png")), present, strict=True) if face
    )
    pixels = torch.frombuffer(bytearray(Image.open(first).tobytes()), dtype=torch.uint8).reshape(1, 64, 64, 3)
    image = pixels.permute(0, 3, 1, 2).float() / 255
    _, landmarks = detector.detect(pixels[0].flip(2).numpy()).largest()
    expected = embedding(embedding.align(image, torch.from_numpy(landmarks)[None]))
    assert_close(bank[:1], expected, rtol=1e-4, atol=1e-5)
    assert embedding.size == SIZE


def test_mistakes_are_told_in_one_line(tmp_path: Path, network: str) -> None:
    (tmp_path / "empty").mkdir()
    save_pictures(tmp_path / "pictures", 1)
    (tmp_path / "there.safetensors").write_text("precious")
    for arguments, message in (
        ([], "images"),
        ([f"--images={tmp_path / 'missing'}"], "--images: there is no folder"),
        ([f"--images={tmp_path / 'empty'}"], "contains no images, such as .jpg or .png"),
        ([f"--images={tmp_path / 'pictures'}", f"--output={tmp_path / 'there.safetensors'}"], "already exists"),
        ([f"--images={tmp_path / 'pictures'}", f"--output={tmp_path / 'there.safetensors' / 'x'}"], "cannot write"),
        ([f"--images={tmp_path / 'pictures'}", "--ouput=x"], "did you mean --output"),
        (
            [f"--images={tmp_path / 'pictures'}", f"--output={tmp_path / 'x'}", "--embedding.path=no.onnx", DETECTOR],
            "no.onnx",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            main(arguments)
        assert "\n" not in str(error.value)
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    assert not (tmp_path / "x").exists()


def test_pictures_without_a_face_make_no_bank(tmp_path: Path, network: str) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), (200, 180, 40)).save(tmp_path / "pictures" / "wall.png")
    with pytest.raises(ValueError, match="no face was detected in the 1 files"):
        main(
            [f"--images={tmp_path / 'pictures'}", f"--output={tmp_path / 'x'}", f"--embedding.path={network}", DETECTOR]
        )
    assert not (tmp_path / "x").exists()


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path, network: str) -> None:
    present = save_pictures(tmp_path / "upright", 8, seed=2)
    (tmp_path / "turned").mkdir()
    for file in (tmp_path / "upright").glob("*.png"):
        picture = Image.open(file).transpose(Image.Transpose.ROTATE_270)
        exif = picture.getexif()
        exif[0x0112] = 8  # to be turned by 90 degrees counterclockwise
        picture.save(tmp_path / "turned" / file.name, exif=exif)
    banks = {}
    for folder in ("upright", "turned"):
        output = tmp_path / f"{folder}.safetensors"
        main([f"--images={tmp_path / folder}", f"--output={output}", f"--embedding.path={network}", DETECTOR])
        banks[folder] = load_file(output)["embeddings"]
    assert len(banks["upright"]) == sum(present)
    assert_close(banks["turned"], banks["upright"])


@pytest.mark.slow
def test_the_command_ends_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fairness_dft.face_bank", "--images", str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --images: there is no folder") and done.stderr.count("\n") == 1
