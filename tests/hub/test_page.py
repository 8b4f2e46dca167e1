"""The report page: one file, everything in it, nothing asked of a network."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from hf_vq.cli import app
from hf_vq.hub.checkpoint import read_checkpoint
from hf_vq.hub.page import render_page
from hf_vq.hub.record import add_to_record
from tests.hub.test_card import EVALUATION, TASK

RTN = [{"bits": 2.28, "kl": 1.2}, {"bits": 3.3, "kl": 0.2}, {"bits": 4.3, "kl": 0.03}]
SAMPLE = {"prompt": "A <b>", "sample": " & so on", "sample_dense": " </script> end"}


class Parser(HTMLParser):
    """Tags that are open, and all attributes that name another place."""

    def __init__(self):
        super().__init__()
        self.stack, self.links, self.rows = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.stack.append(tag)
        self.rows += tag == "tr"
        self.links += [v for k, v in attributes if k in ("src", "href", "data", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture
def folder(quantized, tmp_path):
    return shutil.copytree(quantized("llama")[1], tmp_path / "model")


def parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    assert not parser.stack
    return parser


def test_everything_is_on_the_page_and_nothing_elsewhere(folder):
    add_to_record(folder, {**EVALUATION, **SAMPLE, "rtn": RTN}, [TASK])
    page = render_page(folder)
    found = parsed(page)
    assert not found.links and not re.search(r"@import|url\(|fetch\(|https?://", page)
    checkpoint = read_checkpoint(folder)
    for matrix in checkpoint.matrices:
        assert f">{matrix.name}</td>" in page and f"{matrix.relative_error:.5f}" in page
    assert f"{checkpoint.packed_bytes:,}" in page and f"{checkpoint.packed_bits:.3f}" in page
    for figure in ("24.123", "0.1654", "77.1 %", "arc_easy", "17.4"):
        assert figure in page
    assert page.count("<circle") == 4 and page.count("<rect") == 2 * len(checkpoint.matrices)
    report = json.loads((folder / "quantization_report.json").read_text("utf-8"))
    assert (
        f"{report['cpu_seconds']:.0f} s of processor time, {report['environment']['device']}"
        in page
    )
    assert "A &lt;b&gt; &amp; so on" in page and "&lt;/script&gt; end" in page
    assert page.count("</script>") == 1


def test_without_figures_it_says_so(folder):
    page = render_page(folder)
    parsed(page)
    assert "Not evaluated" in page and "hf-vq eval" in page and "The same prompt" not in page


def test_a_model_without_a_report(folder):
    (folder / "quantization_report.json").unlink()
    page = render_page(folder)
    parsed(page)
    assert page.count("<svg") == 1, "bits are known, errors are not"


def test_a_model_of_another_program(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["quantization_config"]["hf_vq_version"]
    (folder / "config.json").write_text(json.dumps(config))
    page = render_page(folder)
    assert "By another program than hf_vq" in page and "hf-vq quantize" not in page


def test_the_command(folder, tmp_path):
    add_to_record(folder, EVALUATION)
    runner = CliRunner()
    result = runner.invoke(app, ["report", str(folder), "--html"])
    assert result.exit_code == 0 and (folder / "report.html").read_text("utf-8").startswith("<!doc")
    file = tmp_path / "page.html"
    assert runner.invoke(app, ["report", str(folder), "--html", "--file", str(file)]).exit_code == 0
    assert file.read_text("utf-8") == (folder / "report.html").read_text("utf-8")
    shown = runner.invoke(app, ["report", str(folder)])
    assert shown.exit_code == 0 and "24.123" in shown.output and "down_proj" in shown.output
    refused = runner.invoke(app, ["report", str(folder), "--file", str(file)])
    assert refused.exit_code == 2
    assert runner.invoke(app, ["report", str(tmp_path)]).exit_code == 2
