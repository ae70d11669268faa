"""Check the prompt files that ship, those of a user, their splits, and the errors of malformed ones."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from prompt_samples import VALID, write

from fairness_dft.prompts import files as module
from fairness_dft.prompts.datamodule import OccupationPrompts, SportPrompts
from fairness_dft.prompts.files import SPLITS, Prompt, PromptList

pytestmark = pytest.mark.filterwarnings("error")

FOLDER = Path(module.__file__).parents[2] / "data" / "prompts"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
FILLERS = re.compile("an?|and|at|by|for|in|of|on|or|other|related|the|to|with|playing|doing|performing|competing")
TRIVIAL = "assistant chief custom hand head junior parts product professional retail senior"


def words(phrase):
    """Return the set of crudely stemmed words of a phrase, without accents, case, order and fillers."""
    plain = unicodedata.normalize("NFKD", phrase).encode("ascii", "ignore").decode().lower()
    kept = (word for word in re.findall("[a-z]+", plain) if not FILLERS.fullmatch(word))
    return frozenset(re.sub(r"(?<=...)(ings?|ies|es|s|y|e)$", "", word) for word in kept)


def near(trained, evaluated):
    """Return whether a phrase is the other one, a part of it, or the other one and a word that changes nothing."""
    return trained <= evaluated or (evaluated < trained and trained - evaluated <= words(TRIVIAL))


def test_the_near_duplicate_check_recognizes_duplicates():
    pairs = [("Dancers", "dancer"), ("therapist, family", "family therapist"), ("head cook", "cook")]
    pairs += [("surveying technician", "surveying and mapping technician"), ("playing bowls", "bowling")]
    assert all(near(words(a), words(b)) for a, b in pairs)
    assert not near(words("dance teacher"), words("dancer"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_splits_have_no_near_duplicates(name):
    splits = PromptList.from_file(FOLDER / name).splits
    by_text = name in ("occupations_in_context.json", "unlike.json") or name.startswith("named_")
    phrases = {split: [prompt.text if by_text else prompt.subject for prompt in splits[split]] for split in splits}
    stems = {phrase: words(phrase) for own in phrases.values() for phrase in own}
    for split, own in phrases.items():
        assert len({stems[phrase] for phrase in own}) == len(own)
        for other in list(phrases)[list(phrases).index(split) + 1 :]:
            clashes = [(a, b) for a in own for b in phrases[other] if near(stems[a], stems[b])]
            assert not clashes, clashes


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("named_")])
def test_prompts_say_the_classes_that_their_entries_name(name):
    spoken = {"WMELH": "White", "light": "light skin", "tan": "tan skin", "brown": "brown skin", "dark": "dark skin"}
    splits = PromptList.from_file(FOLDER / name).splits
    assert all({attribute for attribute, _ in prompt.names} >= {"gender", "age"} for prompt in splits["test"])
    for prompt in (*splits["train"], *splits["test"]):
        person = prompt.text.removesuffix(f", a {prompt.subject}").split()
        assert prompt.names and person[-1] in ("man", "woman", "person", "skin")
        for _, label in prompt.names:
            assert set(spoken.get(label, label).split()) <= set(person)
        others = {"man", "woman", "young", "old"} - {label for _, label in prompt.names}
        assert not others & set(person)


def test_an_entry_may_name_the_classes_of_its_text(tmp_path):
    entry = {"subject": "chef", "text": "An old woman, a chef", "names": {"gender": "woman", "age": "old"}}
    file = write(tmp_path, {"concept": "job", "test": [entry]}, "named.json")
    names = (("gender", "woman"), ("age", "old"))
    assert PromptList.from_file(file).split("test") == (Prompt(entry["text"], "chef", "job", names),)
    for names in ("woman", {"gender": 1}, {"gender": ""}, {"": "woman"}, ["gender"]):
        write(tmp_path, {"concept": "job", "test": [entry | {"names": names}]}, "named.json")
        with pytest.raises(
            ValueError, match='entry 1 of "test" is .*optionally with "names": {"gender": "woman", ...}$'
        ):
            PromptList.from_file(file)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_tidy(name):
    data = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert data["source"] and data["licence"]
    for split in SPLITS:
        for prompt in PromptList.from_file(FOLDER / name).splits.get(split, ()):
            assert prompt.text == " ".join(prompt.text.split()) and len(prompt.text) < 120
            assert not set("{}|") & set(prompt.text) and prompt.concept == data["concept"]


def test_counts_in_the_readme_are_those_of_the_files():
    rows = re.findall(
        r"^\| `(\S+)` \| (\d+|–) \| (\d+|–) \| (\d+|–) \|", (FOLDER / "README.md").read_text("utf-8"), re.M
    )
    counts = {name: [int(count) if count.isdigit() else 0 for count in row] for name, *row in rows}
    assert counts == {
        name: [len(PromptList.from_file(FOLDER / name).splits.get(split, ())) for split in SPLITS] for name in SHIPPED
    }


def test_occupations_are_those_of_the_paper():
    occupations = PromptList.from_file(FOLDER / "occupations.json")
    assert len(occupations.split("train")) >= 900
    test = [prompt.subject for prompt in occupations.split("test")]
    assert len(test) == 50
    assert test[:3] == ["senator", "violinist", "ticket taker"] and test[-2:] == [
        "health technician",
        "cardiologist",
    ]
    assert len(occupations.split("validation")) == 10
    assert occupations.split("test")[2].text == "A photo of the face of a ticket taker, a person"


def test_no_file_trains_on_prompts_that_another_one_evaluates():
    occupations = PromptList.from_file(FOLDER / "occupations.json").splits
    contexts = PromptList.from_file(FOLDER / "occupations_in_context.json").splits
    trained = {prompt.subject for prompt in occupations["train"]}
    assert {prompt.subject for prompt in contexts["train"]} <= trained
    assert not {prompt.subject for split in ("validation", "test") for prompt in contexts[split]} & trained
    assert len(contexts["train"]) >= 150
    for file in FOLDER.glob("named_*.json"):
        named = PromptList.from_file(file).splits
        assert {prompt.subject for prompt in named["train"]} <= trained
        assert {prompt.subject for prompt in named["test"]} <= {prompt.subject for prompt in occupations["test"]}


def test_json_entries_fill_every_template_or_are_complete_prompts(tmp_path):
    data = {
        "concept": "job",
        "templates": ["a {job}", "{job}, {job}!"],
        "train": [" chef ", {"subject": "pilot", "text": "A pilot in {braces}"}],
    }
    assert PromptList.from_file(write(tmp_path, data)).split("train") == (
        Prompt("a chef", "chef", "job"),
        Prompt("chef, chef!", "chef", "job"),
        Prompt("A pilot in {braces}", "pilot", "job"),
    )


def test_plain_text_is_in_every_split(tmp_path):
    path = write(tmp_path, "\ufeff# mine\n\n  a chef  \na judge, seated\n", "mine.txt")
    expected = (Prompt("a chef", "a chef", "mine"), Prompt("a judge, seated", "a judge, seated", "mine"))
    assert all(PromptList.from_file(path).split(split) == expected for split in SPLITS)


def without(key):
    return {name: value for name, value in VALID.items() if name != key}


MALFORMED = {
    "bad JSON": ('{"concept": "job",\n"train" ["chef"]}', "not JSON at line 2, column 9"),
    "empty file": ("", "not JSON at line 1, column 1"),
    "not an object": (["chef"], "must hold one object"),
    "unknown key": (VALID | {"tests": ["cook"]}, 'unknown key "tests"; the keys are "concept"'),
    "no concept": (without("concept"), '"concept" must be a name'),
    "concept of a wrong type": (VALID | {"concept": 3}, '"concept" must be a name'),
    "no split": ({"concept": "job", "templates": ["a {job}"]}, "there is no split"),
    "empty list": (VALID | {"test": []}, '"test" must be a list with at least one entry'),
    "split of a wrong type": (VALID | {"train": "chef"}, '"train" must be a list'),
    "entry of a wrong type": (VALID | {"train": ["chef", 7]}, 'entry 2 of "train" is 7'),
    "blank entry": (VALID | {"train": [" "]}, "entry 1 of \"train\" is ' '"),
    "half an entry": (VALID | {"train": [{"subject": "chef"}]}, 'entry 1 of "train" is {'),
    "template of a wrong type": (VALID | {"templates": "a {job}"}, '"templates" must be a list of strings'),
    "no placeholder": (
        VALID | {"templates": ["a {joob}"]},
        r'template "a \{joob\}" has no placeholder; write \{job\}',
    ),
    "no template": (without("templates"), 'entry 1 of "train" has no template'),
    "duplicate": (VALID | {"test": ["nurse", " CHEF"]}, '"a CHEF" is in both "train" and "test"'),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_json_is_one_clear_line(tmp_path, case):
    content, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message) as error:
        OccupationPrompts(file=write(tmp_path, content))
    assert "prompts.json" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_split_is_an_error_only_when_it_is_used(tmp_path):
    data = OccupationPrompts(file=write(tmp_path, without("train")))
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 1
    with pytest.raises(ValueError, match='no "train" split, only "validation", "test"; add a "train" list'):
        data.train_dataloader()


@pytest.mark.parametrize("name", ["latin.json", "latin.txt"])
def test_other_encodings_are_rejected(tmp_path, name):
    (tmp_path / name).write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}: byte 3 is not UTF-8"):
        PromptList.from_file(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n  \n", "# only a comment\n"])
def test_text_without_a_prompt_is_rejected(tmp_path, content):
    with pytest.raises(ValueError, match="every line is blank or a comment"):
        PromptList.from_file(write(tmp_path, content, "mine.txt"))


@pytest.mark.parametrize("name", ["missing.json", "missing.txt", "."])
def test_a_missing_file_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="there is no such file; give a path relative to the current"):
        PromptList.from_file(tmp_path / name)


def test_a_prompt_file_in_the_current_directory_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "prompts").mkdir(parents=True)
    write(tmp_path / "data" / "prompts", VALID, "sports.json")
    assert SportPrompts().prompts("train") == [Prompt("a chef", "chef", "job")]
