"""The generated model card: valid metadata, only measured figures, no local paths."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import ModelCard

from hf_vq.configs import CVXQConfig, GPTVQConfig, VPTQConfig
from hf_vq.hub.card import render_card, write_card
from hf_vq.hub.card_rows import reproduce
from hf_vq.hub.record import add_to_record
from tests.models import load, packed

REPORT = {
    "seconds": 14.25,
    "peak_memory_bytes": {"process": 734_003_200},
    "environment": {"torch": "2.13.0", "device": "CPU (model 7)"},
    "matrices": [
        {"name": f"layers.{i}.up_proj", "bits": 2 + i / 8, "relative_error": 0.01 * (i + 1)}
        for i in range(7)
    ],
    "ledger": {
        "decoder_bits": 2.2411,
        "model_bits": 5.5,
        "packed_bytes": 1_234_567,
        "model_bytes": 2_900_000,
        "model_dense_bytes": 8_000_000,
    },
}
EVALUATION = {
    "seqlen": 512,
    "windows": 100,
    "perplexity": 24.1234,
    "perplexity_dense": 20.8896,
    "kl": 0.16543,
    "kl_median": 0.0512,
    "kl_p99": 1.2345,
    "top1": 0.7712,
    "bytes": 2_900_000,
    "dataset": "some-corpus",
    "command": "hf-vq eval OUT --dataset some-corpus",
    "generation": {
        "prompts": 8,
        "new_tokens": 64,
        "repetition": 0.125,
        "repetition_dense": 0.0625,
        "divergence": 17.375,
    },
    "speed": {
        "tokens_per_second": 41.25,
        "prompt_tokens": 32,
        "new_tokens": 64,
        "peak_memory_bytes": {"process": 512_000_000},
    },
    "environment": {"device": "CPU (model 7)"},
}
TASK = {
    "task": "arc_easy",
    "version": 1.0,
    "filter": "none",
    "shots": 0,
    "metric": "acc",
    "value": 0.61237,
    "stderr": 0.01,
    "limit": 50,
    "lm_eval_version": "0.4.13",
}
RECORD = {"evaluations": [EVALUATION], "tasks": [TASK]}


def saved_config(config=None, **recorded) -> dict:
    stored = (config or GPTVQConfig(bits=2.25)).to_dict()
    stored |= {"layers": [{"modules": ["a"]}], "format_version": "1.0", "hf_vq_version": "0.1.0"}
    stored |= recorded
    return {"model_type": "llama", "dtype": "bfloat16", "quantization_config": stored}


def test_metadata_places_the_model_under_its_base():
    text = render_card(saved_config(base_model="org/base", base_model_revision="abc123"))
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "quantized"
    assert {"hf-vq", "gptvq", "quantized", "2-bit"} <= set(data["tags"])
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "abc123" in text and "arxiv.org/abs/2402.15319" in text


def test_what_was_not_measured_is_not_evaluated_and_says_how():
    text = render_card(saved_config())
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert "model-index" not in data and "## Size" not in text and "## Layer by layer" not in text
    measured = text.split("## How good it is")[1].split("##")[0]
    assert measured.count("not evaluated") == 2
    assert "hf-vq eval FOLDER --against" in measured and "--tasks" in measured


def test_the_snippet_imports_the_plugin_and_says_why():
    text = render_card(saved_config(), repository="me/packed")
    assert "import hf_vq" in text and "*random* weights" in text and "not loaded" in text
    assert 'from_pretrained("me/packed"' in text and "LoraConfig" in text


def leaves(value):
    if isinstance(value, dict):
        for entry in value.values():
            yield from leaves(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def figures(text: str) -> list[str]:
    """Decimal and large numbers of a text: what could only have been measured."""
    text = re.sub(r"`[^`]*`|https?://\S+|\d+\.\d+\.\d+", " ", text)
    return re.findall(r"(?<![\w.])\d[\d,]*\.\d+|(?<![\w.])\d{1,3}(?:,\d{3})+", text)


@pytest.mark.parametrize("record", [RECORD, {"evaluations": [EVALUATION]}, None])
def test_every_figure_is_one_of_the_json(record):
    config = saved_config(base_model="org/base")
    text = ModelCard(render_card(config, REPORT, record)).text
    known = list(leaves([REPORT, record, config]))
    found = figures(text)
    assert len(found) > (30 if record else 12)
    for figure in found:
        digits = len(figure.partition(".")[2])
        plain = float(figure.replace(",", ""))
        # as it is, as a percentage, or as kB to TB
        shown = [round(x * f, digits) for x in known for f in (1, 100, 1e-3, 1e-6, 1e-9, 1e-12)]
        assert any(abs(plain - x) < 0.51 * 10**-digits * 1e-3 + 1e-12 for x in shown), figure


def test_results_in_the_metadata_are_those_measured():
    data = ModelCard(render_card(saved_config(), REPORT, RECORD)).data
    results = {r.metric_type: r for r in data.eval_results}
    assert results["perplexity"].metric_value == EVALUATION["perplexity"]
    assert results["kl"].metric_value == EVALUATION["kl"]
    assert results["acc"].metric_value == TASK["value"]
    assert results["kl"].metric_args == {"seqlen": 512, "windows": 100, "tool": "hf-vq"}


def test_without_an_original_nothing_is_made_up():
    alone = {"seqlen": 8, "windows": 3, "perplexity": 30.0, "dataset": "x", "command": "y"}
    text = render_card(saved_config(), None, {"evaluations": [alone]})
    rows = text.split("## How good it is")[1].split("##")[0]
    assert "| perplexity | not evaluated | 30.000 |" in rows
    assert "| KL to the original, mean (nats per token) | 0 | not evaluated |" in rows


def test_the_worst_five_layers_are_named_in_order():
    layers = render_card(saved_config(), REPORT).split("## Layer by layer")[1].split("##")[0]
    assert re.findall(r"`layers\.(\d)", layers) == ["6", "5", "4", "3", "2"]


def test_license_and_languages_are_the_base_model_s():
    inherited = {"license": "llama3.1", "license_link": "LICENSE", "language": ["en", "de"]}
    text = render_card(saved_config(base_model="org/base"), inherited=inherited)
    data = ModelCard(text).data.to_dict()
    assert {k: data[k] for k in inherited} == inherited and "(llama3.1)" in text
    unknown = render_card(saved_config(base_model="org/base"))
    assert "so is its license." in unknown and "license:" not in unknown.split("\n---\n")[0]


@pytest.mark.parametrize(
    ("dataset", "named"),
    [("org/texts:train", ["org/texts"]), ("texts.txt", None), ("12 strings", None), (None, None)],
)
def test_calibration_data_from_the_hub_is_named(dataset, named):
    text = render_card(saved_config(calibration={"dataset": dataset, "seed": 0}))
    assert ModelCard(text).data.datasets == named


def test_cells_cannot_break_the_table():
    calibration = {"dataset": "a|b\n`c`", "nsamples": 4, "seed": None}
    text = render_card(saved_config(calibration=calibration))
    assert "| calibration dataset | `a\\|b 'c'` |" in text
    assert "calibration seed" not in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPTVQConfig(bits=2.25), "--method gptvq --dataset texts.txt --dtype bfloat16 --bits 2.25"),
        (VPTQConfig(bits=3, finetune_steps=96), "--finetune-steps 96"),
        (VPTQConfig(size="7GB"), "--size 7GB"),
        (CVXQConfig(bits=3, bias_correction=True), "--bias-correction"),
        (GPTVQConfig(codebook_update=False), "--no-codebook-update"),
        (GPTVQConfig(modules_to_not_convert=["lm_head"]), "--modules-to-not-convert lm_head"),
        (GPTVQConfig(overrides={"q": {"bits": 3}}), """--overrides '{"q": {"bits": 3}}'"""),
    ],
)
def test_the_command_makes_the_same_config(config, words):
    """What the command line makes of the command is the config that it stands for."""
    import shlex

    import typer
    from typer.testing import CliRunner

    from hf_vq.cli.options import config_class, parse_overrides, with_config_options

    calibration = {"dataset": "texts.txt", "seed": 0, "nsamples": 16, "seqlen": 64}
    stored = {**config.to_dict(), "base_model": "org/base", "calibration": calibration}
    command = reproduce({**stored, "hf_vq_version": "0.1.0"}, "bfloat16")
    assert command is not None and words in command
    app, made = typer.Typer(), []

    def quantize(
        model: str,
        out: str,
        method: str = "",
        dataset: str = "",
        dtype: str = "auto",
        modules_to_not_convert: list[str] | None = None,
        overrides: str | None = None,
        *,
        fields: dict,
    ) -> None:
        made.append(
            config_class(method, fields)(
                **fields,
                modules_to_not_convert=modules_to_not_convert or None,
                overrides=parse_overrides(overrides),
            )
        )

    quantize.__annotations__["modules_to_not_convert"] = list[str] | None
    app.command()(with_config_options(quantize))
    result = CliRunner().invoke(app, shlex.split(command)[2:])
    assert result.exit_code == 0, result.output
    expected = {**config.to_dict(), "nsamples": 16, "seqlen": 64, "seed": 0}
    assert made[0].to_dict() == expected


@pytest.mark.parametrize(
    ("base", "dataset", "word", "note"),
    [
        ("org/base", "org/texts:train", "org/texts:train", None),
        ("org/base", "texts.txt", "texts.txt", "`texts.txt` is a file of whoever made this"),
        ("org/base", "12 strings", "TEXT", "`TEXT` stands for what was given in Python: 12 str"),
        (None, "org/texts", "ORIGINAL", "`ORIGINAL` is the folder of the original model."),
    ],
)
def test_what_a_stranger_lacks_for_the_command_is_said(base, dataset, word, note):
    config = saved_config(base_model=base, calibration={"dataset": dataset, "seed": 0})
    made = render_card(config).split("## How it was made")[1].split("<details>")[0]
    command = re.search(r"```bash\n(.*)\n```", made)
    assert command is not None and f" {word} " in command[1]
    after = made[command.end() :]
    assert note in after if note else after.startswith("\n\nThe same input")


def test_how_another_program_packed_a_model_is_not_made_up():
    text = render_card(saved_config(hf_vq_version=None))
    assert "hf-vq quantize" not in text and "By another program than hf_vq" in text


def test_the_answer_comes_first():
    lines = render_card(saved_config(base_model="org/base"), REPORT, RECORD).splitlines()
    title = lines.index("# base-gptvq")
    assert lines[title + 2] == (
        "**8.000 MB → 2.900 MB, 2.241 bits per compressed weight, everything counted. Perplexity "
        "20.890 → 24.123, KL 0.1654 nats per token, 77.1 % same most likely token (some-corpus, "
        "context 512). Quantized in 14.2 s with a peak of 734.003 MB of memory on CPU (model 7).**"
    )


def test_processor_time_stands_beside_the_clock_s():
    text = render_card(saved_config(), {**REPORT, "cpu_seconds": 9.5})
    assert "Quantized in 14.2 s (9.5 s of processor time) with a peak of" in text


def test_what_kept_its_precision_is_named():
    dense = {
        **{f"layers.{i}.norm_proj": "too small" for i in range(7)},
        "lm_head": "the output head",
    }
    text = render_card(saved_config(), {**REPORT, "dense": dense})
    named = (
        "`layers.3.norm_proj`, `layers.4.norm_proj` and 2 more (too small); `lm_head` (the output"
    )
    assert named in text and "layers.5.norm" not in text


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptvq"}}])
def test_a_dense_model_gets_no_card(config):
    with pytest.raises(ValueError, match="no packed model"):
        render_card(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    packed("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    import shutil

    return shutil.copytree(model, tmp_path / "model")


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_saving_writes_the_card_and_evaluations_go_into_it(folder):
    assert "not evaluated" in card_of(folder)
    add_to_record(folder, EVALUATION)
    assert write_card(folder) and "24.123" in card_of(folder)


def test_figures_of_other_weights_are_not_shown(folder, tmp_path):
    add_to_record(folder, EVALUATION)
    model = load(folder)
    model.save_pretrained(tmp_path / "same", max_shard_size="50KB")
    assert "24.123" in card_of(tmp_path / "same"), "the same tensors in other files"
    with_changes = load(folder)
    with_changes.model.norm.weight.data.add_(1)
    with_changes.save_pretrained(tmp_path / "changed")
    assert "24.123" not in card_of(tmp_path / "changed")
    assert not (tmp_path / "changed" / "evaluation.json").exists()


def test_a_card_of_one_s_own_is_kept(folder, tmp_path):
    (folder / "README.md").write_text("mine")
    assert not write_card(folder) and card_of(folder) == "mine"
    new = tmp_path / "new"
    load(folder).save_pretrained(new)
    (new / "README.md").unlink()
    assert not write_card(new, unless_in=folder) and not (new / "README.md").exists()
    assert write_card(new, unless_in=new / "nothing")


def test_a_card_with_broken_metadata_is_left_alone(folder, caplog):
    broken = card_of(folder).replace("---\n", "---\ntags: [a\n", 1)
    (folder / "README.md").write_text(broken, encoding="utf-8")
    assert not write_card(folder) and card_of(folder) == broken
    assert "is left as it is" in caplog.text and "repair" in caplog.text


def test_text_around_the_generated_part_stays(folder):
    text = (
        card_of(folder).replace("---\n\n<!--", "---\n\nMine above.\n\n<!--", 1) + "\nMine below.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    add_to_record(folder, EVALUATION)
    assert write_card(folder)
    text = card_of(folder)
    assert "Mine above." in text and "Mine below." in text and "24.123" in text
    (folder / "README.md").write_text(text.replace("## Limits", "## My limits"), encoding="utf-8")
    add_to_record(folder, {**EVALUATION, "perplexity": 99.0})
    assert write_card(folder)
    assert "## My limits" in card_of(folder) and "| 99.000 |" not in card_of(folder)


def test_the_license_of_an_earlier_card_stays_in_the_text_too(folder):
    text = card_of(folder).replace("library_name:", "license: mit\nlibrary_name:", 1)
    (folder / "README.md").write_text(text, encoding="utf-8")
    add_to_record(folder, EVALUATION)
    assert write_card(folder)
    assert ModelCard(card_of(folder)).data.license == "mit" and "its license (mit)" in card_of(
        folder
    )


def test_no_card_beside_a_dense_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not write_card(tmp_path) and not (tmp_path / "README.md").exists()
