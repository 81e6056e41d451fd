"""Answers of the harness's Hugging Face backend. A program of its own: torch and JAX never meet.

    python hf_backend.py MODEL REQUESTS.json ANSWERS.json

REQUESTS: {"loglikelihood": [[context, continuation], ...], "loglikelihood_rolling": [[text], ...],
"generate_until": [[context, options], ...]}; ANSWERS has the backend's answer to each.
"""

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]


def main(model, requests, answers):
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=8)
    found = {}
    for kind, some in json.loads(Path(requests).read_text(encoding="utf-8")).items():
        asked = [Instance(kind, {}, tuple(args), i) for i, args in enumerate(some)]
        found[kind] = getattr(lm, kind)(asked)
    Path(answers).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
