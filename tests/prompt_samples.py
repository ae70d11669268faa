"""Write a small valid prompt file."""

import json

VALID = {
    "concept": "job",
    "templates": ["a {job}"],
    "train": ["chef"],
    "validation": ["judge"],
    "test": ["nurse"],
}


def write(tmp_path, content, name="prompts.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)
