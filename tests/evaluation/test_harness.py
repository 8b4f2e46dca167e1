"""lm-eval on a packed model: what its results become, and a task of our own, offline."""

from __future__ import annotations

import json
import sys

import pytest
from transformers import AutoTokenizer

from hf_vq.evaluation.harness import rows_of, run_tasks
from tests.models import packed

FOUND = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.6,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        }
    },
    "versions": {"arc_easy": 1.0},
    "n-shot": {"arc_easy": 0},
}

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""


def test_results_become_rows():
    rows = rows_of(FOUND, 50, "0.4.13")
    assert [(r["metric"], r["value"], r["stderr"]) for r in rows] == [
        ("acc", 0.6, 0.01),
        ("acc_norm", 0.5, None),
    ]
    assert rows[0]["limit"] == 50 and rows[0]["version"] == 1.0 and rows[0]["shots"] == 0


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-vq\[eval\]'"):
        run_tasks(None, None, ["arc_easy"])


def test_a_local_task(tmp_path, docs_llama, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the eval extra: pip install 'hf-vq[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        {"question": f"The capital of {place} is", "choices": [" A", " B"], "answer": i % 2}
        for i, place in enumerate(("France", "Peru", "Japan", "Kenya"))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.format(data=data))
    model = packed("llama")
    model.resize_token_embeddings(4096)  # of the tokenizer
    tokenizer = AutoTokenizer.from_pretrained(docs_llama)
    rows = run_tasks(model, tokenizer, ["capitals"], limit=3, include_path=tmp_path / "tasks")
    assert [(r["task"], r["metric"], r["limit"]) for r in rows] == [("capitals", "acc", 3)]
    assert rows[0]["value"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    with pytest.raises(ValueError, match="no task 'nothing'"):
        run_tasks(model, tokenizer, ["nothing"])
    with pytest.raises(ValueError, match="name a tokenizer"):
        run_tasks(model, None, ["capitals"])
