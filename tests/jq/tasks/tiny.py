"""A tiny random model with a tokenizer, and tasks with their data as files."""

import json

from jq.api import load
from jq.models import Tokenizer
from tests.cli import folders

CONTEXT = 64

_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
metadata:
  version: 2.0
"""
TASKS = {
    "flies": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "letters": """\
output_type: multiple_choice
doc_to_text: "{{question}}:"
doc_to_choice: ["a", "b", "c"]
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
""",
    "texts": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    "next_word": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [" "]
  max_gen_toks: 5
  do_sample: false
metric_list:
  - metric: exact_match
""",
}
GROUP = "group: insects\ntask: [flies, letters]\n"
DOCS = [
    {"question": "the flies fly around a cafe twice and", "choices": [" a", " the cafe", " again"]},
    {"question": "a cafe around the fly", "choices": [" flies", " fly twice", " café"]},
    {"question": "twice and again and", "choices": [" twice", " and", " the flies fly"]},
    {"question": "again the café flies around the fly", "choices": [" a", " café twice", " fly"]},
]


def write_tasks(folder):
    """YAML files and their data -> the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(doc | {"gold": i % 3}) for i, doc in enumerate(DOCS)]
    data = folder / "docs.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(_HEAD.format(name=name, data=data) + body)
    (folder / "insects.yaml").write_text(GROUP)
    return str(folder)


def make(folder):
    """(model, parameters, tokenizer)."""
    folders.write_model(folder, max_position_embeddings=CONTEXT)
    return *load(folder), Tokenizer(folder)
