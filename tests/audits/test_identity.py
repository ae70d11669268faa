"""What an audit depends on, and which changes stop it from continuing."""

import hashlib
import json
from pathlib import Path

import pytest
from torch import nn

from fairness_dft.audits.identity import audit_identity, check_folder, check_identity, flat, network_identity
from fairness_dft.prompts.files import Prompt

CHEF, NURSE = (Prompt(f"a {name}", name, "occupation") for name in ("chef", "nurse"))
SETTINGS = {"split": "test", "model.generator": {"init_args": {"path": Path("model")}}, "name": "mine"}


def test_identity_holds_deciding_settings_and_the_content_of_prompts_images_and_adapter(tmp_path: Path) -> None:
    image, adapter = tmp_path / "0.png", tmp_path / "lora.safetensors"
    image.write_bytes(b"image")
    adapter.write_bytes(b"weights")
    identity = audit_identity(SETTINGS, [CHEF, NURSE], [image], [adapter])
    assert identity["split"] == "test" and identity["model.generator.init_args.path"] == "model"
    assert identity["content"] == hashlib.sha256(b"a chef\na nurseimage").hexdigest()
    assert identity["adapter.lora.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert "name" not in identity and json.loads(json.dumps(identity)) == identity


def test_networks_are_hashed_by_what_they_compute() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    identity = network_identity([first], None)
    assert identity == network_identity([first], None) and list(identity) == ["networks.judges"]
    assert identity != network_identity([second], None)
    holder = nn.Module()
    holder.unet = second
    assert network_identity([first], holder).keys() == {"networks.judges", "networks.generator"}


def audit(folder: Path, finished: bool, **identity: str) -> Path:
    (folder / "audit.json").write_text(json.dumps(identity))
    if finished:
        (folder / "results.json").write_text("{}")
    return folder


BEFORE = {"split": "test", "content": "a", "data.init_args.test_prompts": "2", "networks.judges": "b"}


def test_a_new_audit_and_an_unchanged_one_continue(tmp_path: Path) -> None:
    check_identity(tmp_path, BEFORE)
    for finished in (False, True):
        check_identity(audit(tmp_path, finished, **BEFORE), BEFORE)


@pytest.mark.parametrize("key", ["content", "data.init_args.test_prompts", "networks.judges"])
def test_an_unfinished_audit_may_change_what_does_not_touch_its_images(tmp_path: Path, key: str) -> None:
    check_identity(audit(tmp_path, False, **BEFORE), BEFORE | {key: "other"})
    with pytest.raises(ValueError, match=f"is an audit with {key} '.', not 'other'; choose another name, or remove"):
        check_identity(audit(tmp_path, True, **BEFORE), BEFORE | {key: "other"})


@pytest.mark.parametrize("change", [{"split": "train"}, {"networks.generator": "c"}, {"adapter.lora": "d"}])
def test_what_decides_the_images_never_changes(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"is an audit with {next(iter(change))}"):
        check_identity(audit(tmp_path, False, **BEFORE), BEFORE | change)


def test_networks_count_only_once_they_are_loaded(tmp_path: Path) -> None:
    before = BEFORE | {"networks.generator": "c"}
    check_identity(audit(tmp_path, True, **before), {key: before[key] for key in before if "networks" not in key})
    with pytest.raises(ValueError, match="networks.generator 'c', not None"):
        check_identity(tmp_path, BEFORE)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "missing")
    for name in ("config.yaml", "audit.part", ".hidden"):
        (tmp_path / name).touch()
        check_folder(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="already exists and is not an audit; choose another name"):
        check_folder(tmp_path)
    check_folder(audit(tmp_path, False))


def test_leaves_are_named_by_keys_with_dots() -> None:
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [2]})) == {"a.b": 1, "a.c": {}, "d": [2]}
