"""Our answers against those of the harness's own Hugging Face backend, request by request.

Skipped where torch, transformers or lm-eval is missing; they may live in another environment:
JAXQ_TORCH_PYTHON names its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jq.api import load
from jq.demo_model import demo_model_path
from jq.models import Tokenizer

PYTHON = os.environ.get("JAXQ_TORCH_PYTHON", sys.executable)
_ROOT = Path(__file__).parents[3]
REFERENCE = Path(os.environ.get("JAXQ_REFERENCE_DATA", _ROOT.parent / "shared")) / "data"
MODELS = {"demo": demo_model_path, "reference": lambda: REFERENCE / "ref-llama"}


def _requests(text):
    words = text.split()
    pieces = [" ".join(words[i : i + 24]) for i in range(0, 24 * 12, 24)]
    pairs = []
    for i, piece in enumerate(pieces):
        stem, end = piece.rsplit(" ", 2)[0], piece.split(" ")
        # Four choices of one context, one of them right, one of another length.
        pairs += [(stem, " " + x) for x in (" ".join(end[-2:]), end[0], " ".join(end[:5]), "A")]
        pairs.append(("", piece) if i % 2 else (stem + " ", end[-1]))
    pairs += [("<|endoftext|>" + pieces[0], " the"), ("caf\u00e9 \u2014", " na\u00efve")]
    pairs.append((" ".join(words[:900]), " and more"))  # longer than the context
    options = [
        {"until": ["\n", "."], "max_gen_toks": 12},
        {"until": [" the"], "max_new_tokens": 16, "do_sample": False, "temperature": 0.0},
    ]
    texts = [[piece, options[i % 2]] for i, piece in enumerate(pieces[:6])]
    texts.append([" ".join(words[:900]), options[0]])
    rolling = [[" ".join(words[i : i + 40])] for i in (0, 40, 80)] + [[" ".join(words[:900])]]
    return {"loglikelihood": pairs, "loglikelihood_rolling": rolling, "generate_until": texts}


@pytest.fixture(params=MODELS)
def answers(request, tmp_path):
    """(folder, requests, the backend's answers)."""
    folder = MODELS[request.param]()
    if not folder.is_dir():
        pytest.skip("the reference model is not there; name its folder in JAXQ_REFERENCE_DATA")
    probe = [PYTHON, "-c", "import torch, transformers, accelerate, lm_eval"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} lacks torch, transformers or lm-eval; set JAXQ_TORCH_PYTHON")
    text = (demo_model_path() / "evaluation.txt").read_text(encoding="utf-8")
    if request.param == "reference":
        text = (REFERENCE / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    asked, answered = tmp_path / "requests.json", tmp_path / "answers.json"
    asked.write_text(json.dumps(_requests(text)), encoding="utf-8")
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("hf_backend.py")), str(folder), asked, answered],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(asked.read_text()), json.loads(answered.read_text())


@pytest.mark.slow
def test_answers_are_those_of_the_hugging_face_backend(answers, tasks):
    from jq.tasks import HarnessLM

    folder, requests, theirs = answers
    model, params = load(folder)
    # Both in float32: what is left is the order of sums.
    lm = HarnessLM(model.clone(dtype=jnp.float32), params, Tokenizer(folder), batch_size=8)
    ours = {
        kind: getattr(lm, kind)([SimpleNamespace(args=tuple(args)) for args in some])
        for kind, some in requests.items()
    }
    greedy = [answer[1] for answer in ours["loglikelihood"]]
    assert greedy == [answer[1] for answer in theirs["loglikelihood"]]
    assert ours["generate_until"] == theirs["generate_until"]
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        a, b = (np.array([np.ravel(x)[0] for x in answers[kind]]) for answers in (ours, theirs))
        worst = float(np.max(np.abs(a - b) / np.abs(b)))
        print(f"{folder.name}: {len(a)} {kind}, largest relative difference {worst:.1e}")
        assert worst < 1e-5
