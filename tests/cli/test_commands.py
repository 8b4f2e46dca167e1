"""The commands on small models: what they write, and how they refuse."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_vq.cli import app
from hf_vq.hub.checkpoint import read_checkpoint

runner = CliRunner()
FAST = ["--bits", "3", "--nsamples", "8", "--seqlen", "64", "--kmeans-iterations", "3"]
FAST += ["--refine-iterations", "0", "--no-codebook-update"]
SMALL = LlamaConfig(
    hidden_size=64,
    intermediate_size=100,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=4096,  # of the bundled tokenizer
    max_position_embeddings=128,
)
COMPARE = ["compare", "{dense}", "--dataset", "{text}", "--eval-dataset", "{text}"]
TEXT = "The function returns a list of names, and raises ValueError if there is none. " * 120


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (rows, length), generator=torch.Generator().manual_seed(0))


def hf_vq(*arguments) -> str:
    """Output of a command that works."""
    result = runner.invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments) -> tuple[int, str]:
    """Exit code and message, on one line, of a command that does not."""
    result = runner.invoke(app, list(map(str, arguments)))
    assert result.exit_code != 0 and "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory, docs_llama):
    """A small model with a tokenizer and a text; and the same model packed from the shell."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_VQ_PROGRESS", "0")
        torch.manual_seed(0)
        LlamaForCausalLM(SMALL).to(torch.bfloat16).save_pretrained(folder / "dense")
        AutoTokenizer.from_pretrained(docs_llama).save_pretrained(folder / "dense")
        (folder / "text.txt").write_text(TEXT)
        hf_vq(
            "quantize", folder / "dense", folder / "packed", "--dataset", folder / "text.txt", *FAST
        )
    return folder


@pytest.mark.smoke
def test_quantize_writes_a_model_that_loads_with_its_tokenizer_and_card(folders):
    packed = AutoModelForCausalLM.from_pretrained(folders / "packed")
    config = packed.config.quantization_config
    assert config.bits == 3 and config.nsamples == 8 and config.kmeans_iterations == 3
    assert config.damping == type(config)().damping
    assert packed(tokens(1, 16)).logits.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(folders / "packed")
    assert tokenizer("names")["input_ids"]
    assert "import hf_vq" in (folders / "packed" / "README.md").read_text(encoding="utf-8")
    assert "text.txt" in json.dumps(config.to_dict()["calibration"])
    assert str(folders) not in (folders / "packed" / "config.json").read_text()


def test_inspect(folders):
    checkpoint = read_checkpoint(folders / "packed")
    assert 2.5 < checkpoint.packed_bits <= 3.0
    output = hf_vq("inspect", folders / "packed")
    assert f"{checkpoint.packed_bytes:,}" in output and f"{checkpoint.file_bytes:,}" in output
    assert "down_proj" in output and "embedding" in output
    assert "down_proj" not in hf_vq("inspect", folders / "packed", "--no-layers")
    figures = json.loads(hf_vq("inspect", folders / "packed", "--json"))
    assert figures["packed"]["bits_per_weight"] == checkpoint.packed_bits
    assert len(figures["layers"]) == 14
    assert all(0 < layer["relative_error"] < 1 for layer in figures["layers"])


def test_eval(folders, tmp_path):
    arguments = ["--dataset", folders / "text.txt", "--seqlen", "64", "--max-windows", "5"]
    arguments += ["--max-new-tokens", "3", "--json", tmp_path / "figures.json"]
    output = hf_vq("eval", folders / "packed", "--against", folders / "dense", *arguments)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["windows"] == 5 and figures["seqlen"] == 64 and figures["kl"] > 0
    assert f"{figures['perplexity']:.4f}" in output and f"{figures['kl']:.4f}" in output
    hf_vq("eval", folders / "packed", *arguments)
    alone = json.loads((tmp_path / "figures.json").read_text())
    assert alone["perplexity"] == pytest.approx(figures["perplexity"]) and "kl" not in alone


def test_figures_are_kept_and_go_into_the_card(folders, tmp_path):
    out, logits = tmp_path / "packed", tmp_path / "logits"
    shutil.copytree(folders / "packed", out, ignore=shutil.ignore_patterns("evaluation.json"))
    original = shutil.copytree(folders / "dense", tmp_path / "dense")
    (original / "README.md").write_text("---\nlicense: mit\n---\n# Dense\n")
    arguments = ["--against", original, "--dataset", folders / "text.txt"]
    arguments += ["--seqlen", "64", "--max-windows", "3", "--prompt", "", "--rtn"]
    hf_vq("eval", out, *arguments, "--teacher", logits)
    record = json.loads((out / "evaluation.json").read_text())
    (found,) = record["evaluations"]
    assert found["dataset"] == "text.txt" and found["generation"]["prompts"] == 3
    assert found["speed"]["tokens_per_second"] > 0 and found["kl_p99"] >= found["kl_median"]
    assert [round(row["bits"], 2) for row in found["rtn"]] == sorted(
        round(row["bits"], 2) for row in found["rtn"]
    )
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{found['perplexity']:.3f}" in card and f"{found['kl']:.4f}" in card
    assert str(tmp_path) not in card and str(tmp_path) not in json.dumps(record)
    assert "\nlicense: mit\n" in card and "so is its license (mit)" in card
    hf_vq("eval", out, *arguments, "--teacher", logits, "--no-generate")
    (again,) = json.loads((out / "evaluation.json").read_text())["evaluations"]
    assert again["kl"] == found["kl"] and "speed" not in again, "the later one replaces it"
    hf_vq("eval", out, *arguments, "--no-card", "--seqlen", "32")
    assert len(json.loads((out / "evaluation.json").read_text())["evaluations"]) == 1
    code, message = refused("eval", out, *arguments, "--teacher", logits, "--max-windows", "2")
    assert code == 1 and "other text or windows" in message


def test_eval_of_a_model_against_itself_is_zero(folders, tmp_path):
    json_file = tmp_path / "figures.json"
    arguments = ["--dataset", folders / "text.txt", "--seqlen", "64", "--prompt", ""]
    hf_vq(
        "eval", folders / "dense", "--against", folders / "dense", *arguments, "--json", json_file
    )
    figures = json.loads(json_file.read_text())
    assert figures["kl"] == 0 and figures["top1"] == 1 and "sample" not in figures


def test_token_files_need_no_tokenizer(folders, tmp_path):
    import numpy as np

    model = tmp_path / "model"
    shutil.copytree(folders / "dense", model, ignore=shutil.ignore_patterns("tokenizer*"))
    data = tmp_path / "tokens.npy"
    np.save(data, tokens(10, 64).numpy().astype(np.uint16))
    output = hf_vq("quantize", model, tmp_path / "out", "--dataset", data, *FAST)
    assert "has no tokenizer" in " ".join(output.split())
    hf_vq("eval", tmp_path / "out", "--dataset", data, "--seqlen", "32")
    code, message = refused(
        "quantize", model, tmp_path / "out2", "--dataset", folders / "text.txt", *FAST
    )
    assert code == 1 and "tokenizer" in message and not (tmp_path / "out2").exists()


def test_overrides_and_exceptions(folders, tmp_path):
    hf_vq(
        *("quantize", folders / "dense", tmp_path / "out", "--dataset", folders / "text.txt"),
        *("--overrides", '{"re:.*down_proj": {"vector_dim": 1}, "o_proj": false}'),
        *("--modules-to-not-convert", "layers.1", "--modules-to-not-convert", "up_proj", *FAST),
    )
    names = {m.name for m in read_checkpoint(tmp_path / "out").matrices}
    expected = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    expected += ("mlp.gate_proj", "mlp.down_proj")
    assert names == {f"model.layers.0.{name}" for name in expected}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    dims = {name: g["vector_dim"] for g in config["layers"] for name in g["modules"]}
    assert dims["model.layers.0.mlp.down_proj"] == 1


def test_quantizing_again_replaces_the_old_model(folders, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folders / "packed", out)
    (out / "notes.txt").write_text("mine")
    arguments = ["quantize", folders / "dense", out, "--dataset", folders / "text.txt", *FAST]
    hf_vq(*arguments, "--bits", "4")
    assert read_checkpoint(out).packed_bits > 3.5
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["quantize", "{dense}", "{out}", "--bits", "0.5"], 2, "from 1 to 8"),
        (["quantize", "{dense}", "{out}", "--method", "magic"], 2, "not one of gptvq"),
        (["quantize", "{dense}", "{dense}"], 2, "is or contains MODEL"),
        (["quantize", "{dense}", "{out}", "--overrides", "{{"], 2, "no valid JSON"),
        (["quantize", "{dense}", "{out}", "--overrides", '{{"q": {{"bits": 99}}}}'], 1, "99"),
        (["quantize", "{dense}", "{out}", "--dataset", "{dense}/none.txt"], 1, "none.txt"),
        (["quantize", "{packed}", "{out}", "--dataset", "{text}"], 1, "already quantized"),
        (["quantize", "{dense}/nothing", "{out}"], 1, "no folder"),
        (["quantize", "{dense}", "{out}", "--tokenizer", "{out}"], 1, "no tokenizer"),
        (["inspect", "{dense}"], 1, "no model packed"),
        (["inspect", "{out}"], 2, "is no folder"),
        (["eval", "{packed}", "--dataset", "{dense}/none.txt"], 1, "none.txt"),
        (["eval", "{packed}", "--dataset", "{text}", "--seqlen", "100000"], 1, "smaller seqlen"),
        (["eval", "{packed}"], 2, "--dataset"),
        (["eval", "{packed}", "--dataset", "{text}", "--rtn"], 2, "--rtn"),
        (["eval", "{packed}", "--dataset", "{text}", "--teacher", "{out}"], 2, "--teacher"),
        (
            [
                "compare",
                "{dense}",
                "--dataset",
                "{text}",
                "--eval-dataset",
                "{text}",
                "--methods",
                "x",
            ],
            2,
            "none of",
        ),
        (
            [
                "compare",
                "{dense}",
                "--dataset",
                "{text}",
                "--eval-dataset",
                "{text}",
                "--bits",
                "9",
            ],
            2,
            "from 1 to 8",
        ),
    ],
)
def test_bad_input_is_one_clear_error(folders, tmp_path, arguments, code, text, monkeypatch):
    monkeypatch.delenv("HF_VQ_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    places = {name: folders / name for name in ("dense", "packed")}
    places |= {"out": tmp_path / "out", "text": folders / "text.txt"}
    got, message = refused(*(a.format(**places) for a in arguments))
    assert got == code and text in message, message
    assert not (tmp_path / "out").exists()


def test_version_and_bare_call():
    from hf_vq import __version__

    assert hf_vq("--version").strip() == __version__
    assert "quantize" in runner.invoke(app, []).output


def test_packed_logits_do_not_depend_on_how_the_model_was_reached(folders):
    one = AutoModelForCausalLM.from_pretrained(folders / "packed")
    two = AutoModelForCausalLM.from_pretrained(folders / "packed", device_map="cpu")
    probe = tokens(2, 32)
    assert torch.equal(one(probe).logits, two(probe).logits)
