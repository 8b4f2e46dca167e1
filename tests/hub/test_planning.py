"""Plans of models that are not loaded: from a folder, a config or a Hub id."""

from __future__ import annotations

import json
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import hf_vq
from hf_vq.hub import planning
from hf_vq.hub.checkpoint import read_checkpoint, read_headers
from hf_vq.hub.planning import group_rows, name_patterns, plan_model
from hf_vq.plan import PlanError, make_plan
from hf_vq.registry import METHODS
from tests.models import QUICK, load, on_meta, tiny, tokens

CONFIGS = {name: method.config for name, method in METHODS.items()}
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", list(CONFIGS))
def test_a_folder_gives_the_plan_of_its_model(dense, method):
    config = CONFIGS[method](3.0)
    plan = hf_vq.plan_model(dense, config)
    expected = make_plan(tiny("llama"), config)
    assert plan.checked and not expected.checked
    assert plan.layers == expected.layers and plan.dense == expected.dense
    assert plan.ledger() == expected.ledger()
    assert plan_model(str(dense), config) == plan


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mixtral", "opt", "qwen2"])
def test_a_config_alone_suffices(tmp_path, kind):
    model = tiny(kind)
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(tmp_path)
    plan = plan_model(tmp_path, hf_vq.GPTVQConfig(2.75))
    assert not plan.checked
    assert plan.ledger() == make_plan(model, hf_vq.GPTVQConfig(2.75)).ledger()
    assert plan_model(model.config, hf_vq.GPTVQConfig(2.75)) == plan


def test_a_model_is_planned_as_it_is():
    model = on_meta()
    assert plan_model(model, hf_vq.GPTVQConfig(2.75)) == make_plan(model, hf_vq.GPTVQConfig(2.75))


def _quantizes(method: str) -> bool:
    """Whether `from_pretrained` already packs with this method."""
    try:
        return callable(METHODS[method].quantize)
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("method", list(CONFIGS))
def test_the_saved_files_hold_what_was_planned(dense, tmp_path, method):
    if not _quantizes(method):
        pytest.skip(f"{method} has no quantizer")
    fields = {k: v for k, v in QUICK.items() if k in CONFIGS[method].rules}
    config = CONFIGS[method](
        3.0, dataset=tokens(4, 64), seqlen=64, nsamples=4, allocation="uniform", **fields
    )
    plan = plan_model(dense, config)
    load(dense, quantization_config=config, dtype="auto").save_pretrained(tmp_path)
    saved = read_checkpoint(tmp_path)
    ledger = plan.ledger()
    if method == "cvxq":  # depths cannot always spend the last words
        assert 0.999 * ledger.packed_bytes <= saved.packed_bytes <= ledger.packed_bytes
        planned = {row.name: row.bytes for row in ledger.rows if not row.reason}
        assert all(m.nbytes <= planned.pop(m.name) for m in saved.matrices) and not planned
        return
    assert saved.packed_bytes == ledger.packed_bytes
    assert saved.packed_bytes + saved.dense_bytes == ledger.model_bytes
    assert {m.name: m.nbytes for m in saved.matrices} == {
        row.name: row.bytes for row in ledger.rows if not row.reason
    }


@pytest.mark.parametrize("method", list(CONFIGS))
def test_a_model_of_70_billion_takes_no_memory(method):
    plan = plan_model(LLAMA_70B, CONFIGS[method](2.25))
    ledger = plan.ledger()
    assert len(plan.layers) == 560
    assert 2.2 < ledger.decoder_bits <= 2.25
    assert ledger.model_dense_bytes == 2 * ledger.model_params > 141e9
    assert 20e9 < ledger.model_bytes < 25e9
    # q and o, k and v, gate and up, down: four shapes, of which some can have a little more
    assert 4 <= sum(group.spec is not None for group in group_rows(plan)) <= 12


@pytest.mark.parametrize("dtype", ["auto", "float32", torch.float16, None])
def test_dtype_is_that_of_from_pretrained(dense, dtype):
    ledger = plan_model(dense, hf_vq.GPTVQConfig(3.0), dtype=dtype).ledger()
    model = load(dense, dtype=dtype)
    assert ledger.model_dense_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_dtype_comes_from_the_files_if_the_config_has_none(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(dense / "model.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    plan = plan_model(tmp_path, hf_vq.GPTVQConfig(3.0))
    assert plan.ledger().model_dense_bytes == 2 * plan.ledger().model_params


def test_unknown_dtype(dense):
    with pytest.raises(ValueError, match="neither 'auto'"):
        plan_model(dense, hf_vq.GPTVQConfig(3.0), dtype="float17")


def test_modules_kept_in_float32_are_counted_so(monkeypatch):
    from transformers import LlamaForCausalLM

    config = tiny("llama").config
    before = plan_model(config, hf_vq.GPTVQConfig(3.0), dtype="bfloat16").ledger()
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["embed_tokens"])
    after = plan_model(config, hf_vq.GPTVQConfig(3.0), dtype="bfloat16").ledger()
    embedding = config.vocab_size * config.hidden_size
    assert after.model_bytes == before.model_bytes + 2 * embedding


def test_persistent_buffers_are_counted():
    model = on_meta()
    bare = make_plan(model, hf_vq.GPTVQConfig(3.0)).ledger()
    model.register_buffer("table", torch.zeros(7), persistent=True)
    model.register_buffer("scratch", torch.zeros(9), persistent=False)
    full = make_plan(model, hf_vq.GPTVQConfig(3.0)).ledger()
    assert full.model_bytes == bare.model_bytes + 28 and full.model_params == bare.model_params


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_files_that_contradict_the_config_are_refused(dense, tmp_path, change):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(dense / "model.safetensors")
    if change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    with pytest.raises(PlanError, match=f"{name} is .* in the weight files"):
        plan_model(tmp_path, hf_vq.GPTVQConfig(3.0))


def test_a_quantized_model_is_refused(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"already quantized \(gptq\)"):
        plan_model(tmp_path, hf_vq.GPTVQConfig(3.0))


def test_a_hub_id_is_checked_by_its_headers(dense, monkeypatch, caplog):
    """The Hub is played by a folder."""
    import huggingface_hub
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(dense)
    asked = []

    def from_pretrained(name, **where):
        asked.append((name, where))
        return config

    def metadata(name, revision=None):
        info = {
            name: types.SimpleNamespace(dtype=t.dtype, shape=list(t.shape), data_offsets=(8, 12))
            for name, t in read_headers(dense).items()
        }
        asked.append((name, revision))
        return types.SimpleNamespace(files_metadata={"x": types.SimpleNamespace(tensors=info)})

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    plan = plan_model("someone/model", hf_vq.GPTVQConfig(3.0), revision="v2")
    assert plan.checked
    assert asked == [("someone/model", {"revision": "v2"}), ("someone/model", "v2")]

    def offline(name, revision=None):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    with caplog.at_level("WARNING", logger=planning.__name__):
        alone = plan_model("someone/model", hf_vq.GPTVQConfig(3.0))
    assert not alone.checked and "rests on its config alone: no network" in caplog.text
    assert alone.ledger() == plan.ledger()


def test_groups_hold_every_row_once():
    config = hf_vq.GPTVQConfig(3.0, overrides={"layers.0.mlp": {"bits": 4}, "k_proj": False})
    plan = make_plan(on_meta(), config)
    groups = group_rows(plan)
    rows = [row for group in groups for row in group.rows]
    assert sorted(rows) == sorted(plan.ledger().rows)
    for group in groups:
        assert {row.shape for row in group.rows} == {group.rows[0].shape}
        for row in group.rows:
            assert group.spec == plan.layers.get(row.name)
    assert json.loads(json.dumps([g.to_dict() for g in groups]))[-1]["reason"]


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["lm_head"], ["lm_head"]),
        (["a.0.q", "a.0.k", "a.1.q", "a.1.k"], ["a.[0-1].{q,k}"]),
        (["a.0.q", "a.1.q", "a.2.q", "a.4.q", "a.1.k"], ["a.[0-2,4].q", "a.1.k"]),
        (["h.3.m.0.w", "h.4.m.0.w", "h.3.m.1.w"], ["h.[3-4].m.0.w", "h.3.m.1.w"]),
        (["a.b", "a.c", "d"], ["a.{b,c}", "d"]),
        (["layers.0", "layers.1"], ["layers.[0-1]"]),
        (["x1.y", "x2.y"], ["x1.y", "x2.y"]),
    ],
)
def test_name_patterns(names, patterns):
    assert name_patterns(names) == patterns


PART = st.sampled_from(["a", "b", "q", "0", "1", "2", "10", "x3"])


@given(st.lists(st.lists(PART, min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
def test_name_patterns_keep_every_name(names):
    assert sorted(_expand(name_patterns(names))) == sorted(names)


def _expand(patterns: list[str]) -> list[str]:
    out = []
    for pattern in patterns:
        head, brace, rest = pattern.partition("{")
        for leaf in rest[:-1].split(",") if brace else [""]:
            name = head + leaf
            before, bracket, after = name.partition("[")
            if not bracket:
                out.append(name)
                continue
            spans, _, tail = after.partition("]")
            for span in spans.split(","):
                low, _, high = span.partition("-")
                out += [f"{before}{i}{tail}" for i in range(int(low), int(high or low) + 1)]
    return out
