"""Blocks run one by one do exactly what they do inside their model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_vq.engine.blocks import BlockError, BlockPath, StopForward, capture, find_blocks, twin
from tests import fakes
from tests.models import tiny, tokens

KINDS = ["llama", "llama-bias", "qwen2", "opt", "mixtral"]
CPU = torch.device("cpu")


def linears_of(block):
    return {n: m for n, m in block.named_modules() if type(m) is nn.Linear}


def walk(model, batches, **options):
    """Blocks, captured calls, and a list over blocks of outputs per batch."""
    blocks = list(find_blocks(model).values())
    captured = capture(model, blocks, batches)
    hidden, outputs = captured.hidden, []
    for i, block in enumerate(blocks):
        with BlockPath(block, i, captured, CPU) as path:
            hidden = [path.run(b, h) for b, h in enumerate(hidden)]
        outputs.append(hidden)
    return blocks, captured, outputs


def in_the_model(model, blocks, batches):
    """The same by running the model and listening to its blocks."""
    outputs = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out, i=i: outputs[i].append(out if torch.is_tensor(out) else out[0])
        )
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return outputs


# -- find_blocks ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("llama", "model.layers"),
        ("qwen2", "model.layers"),
        ("opt", "model.decoder.layers"),
        ("mixtral", "model.layers"),
    ],
)
def test_blocks_of_real_architectures(kind, prefix):
    model = tiny(kind)
    blocks = find_blocks(model)
    assert list(blocks) == [f"{prefix}.0", f"{prefix}.1"]
    assert all(model.get_submodule(name) is block for name, block in blocks.items())


def test_more_than_ten_blocks_stay_in_order():
    assert list(find_blocks(fakes.model(layers=12))) == [f"layers.{i}" for i in range(12)]


def test_nested_lists_are_not_blocks():
    assert list(find_blocks(fakes.model("sparse"))) == ["layers.0", "layers.1", "layers.2"]


def test_declared_blocks_come_before_larger_lists():
    model = fakes.model()
    model.extra = nn.ModuleList(nn.Linear(500, 500) for _ in range(4))
    assert next(iter(find_blocks(model))) == "extra.0"
    model._no_split_modules = ["Block"]
    assert list(find_blocks(model)) == ["layers.0", "layers.1", "layers.2"]


def test_lists_without_linears_are_not_blocks():
    assert find_blocks(nn.ModuleDict({"a": nn.ModuleList([nn.LayerNorm(9)])})) == {}
    assert find_blocks(nn.Linear(3, 3)) == {}


# -- capture ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_alone_equal_blocks_in_the_model(kind):
    model = tiny(kind, torch.float32)
    batches = list(tokens(7, 24).split(3))  # the last one is smaller
    blocks, captured, outputs = walk(model, batches)
    for found, expected in zip(outputs, in_the_model(model, blocks, batches), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert set(captured.calls) == {(3, 24), (1, 24)}


def test_blocks_alone_give_the_models_hidden_states():
    model = tiny("llama", torch.float32)
    _, captured, outputs = walk(model, [tokens(3, 24)])
    with torch.no_grad():
        states = model(tokens(3, 24), output_hidden_states=True).hidden_states
        assert torch.equal(captured.hidden[0], states[0])
        assert torch.equal(outputs[0][0], states[1])
        assert torch.equal(model.model.norm(outputs[1][0]), states[2])


@pytest.mark.parametrize("kind", ["plain", "tuple", "sparse"])
@pytest.mark.parametrize("layers", [1, 3])
def test_any_stack_of_blocks(kind, layers):
    model = fakes.model(kind, layers)
    batches = list(fakes.ids(5).split(2))
    blocks, captured, outputs = walk(model, batches)
    for found, expected in zip(outputs, in_the_model(model, blocks, batches), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert len(captured.hidden) == 3
    assert [len(calls) for calls in captured.calls.values()] == [layers, layers]


def test_capture_does_not_run_the_blocks_and_leaves_them_as_they_were():
    model = fakes.model("tuple")
    before = model(fakes.ids())
    runs = [block.mlp.runs for block in model.layers]
    capture(model, list(model.layers), [fakes.ids()])
    assert [block.mlp.runs for block in model.layers] == runs
    assert all("forward" not in block.__dict__ for block in model.layers)
    assert torch.equal(model(fakes.ids()), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"between": "add"}, "between"),
        ({"between": "shorten"}, "shape"),
        ({"runs_blocks": False}, "does not run the blocks"),
    ],
)
def test_models_that_are_no_plain_stack_are_refused(options, says):
    model = fakes.model(**options)
    with pytest.raises(BlockError, match=rf"Fake: .*{says}"):
        capture(model, list(model.layers), [fakes.ids()], "Fake")
    assert all("forward" not in block.__dict__ for block in model.layers)


def test_blocks_that_shorten_the_sequence_are_refused():
    with pytest.raises(BlockError, match="shape"):
        walk(fakes.model("halving"), [fakes.ids()])


def test_nan_states_are_no_reason_to_refuse():
    model = fakes.model()
    with torch.no_grad():
        model.embed.weight[int(fakes.ids()[2, 3])] = float("nan")
    captured = capture(model, list(model.layers), [fakes.ids()])
    assert bool(captured.hidden[0].isnan().any())


# -- probe ------------------------------------------------------------------


def probe(model, batch, names=None):
    blocks = list(find_blocks(model).values())
    captured = capture(model, blocks, [batch])
    linears = linears_of(blocks[0])
    linears = {n: linears[n] for n in names} if names is not None else linears
    with BlockPath(blocks[0], 0, captured, CPU) as path:
        layout = path.probe(linears, captured.hidden[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in blocks[0].modules())
    return layout


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen2"])
def test_groups_share_an_input_and_follow_execution(kind):
    layout = probe(tiny(kind, torch.float32), tokens(2, 16))
    assert layout.groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert layout.tails == {"self_attn": ("self_attn.o_proj", 1), "mlp": ("mlp.down_proj", None)}
    assert layout.replayable == {"self_attn", "mlp"}


def test_linears_directly_in_the_block():
    layout = probe(tiny("opt", torch.float32), tokens(2, 16))
    assert layout.groups[0] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert layout.groups[1:] == [["self_attn.out_proj"], ["fc1"], ["fc2"]]
    assert layout.replayable == {"self_attn"}


def test_only_what_is_asked_for():
    names = ["mlp.up_proj", "self_attn.o_proj"]
    layout = probe(tiny("llama", torch.float32), tokens(2, 16), names)
    assert layout.groups == [["self_attn.o_proj"], ["mlp.up_proj"]]
    assert layout.tails == {"self_attn": ("self_attn.o_proj", 1)}


def test_experts_that_no_token_reached_come_last():
    layout = probe(fakes.model("sparse"), fakes.ids())
    assert layout.groups[:2] == [["mixer.k", "mixer.q"], ["mixer.o"]]
    middle = {tuple(g) for g in layout.groups[2:-3]}
    assert middle == {
        *((f"mlp.experts.{e}.gate", f"mlp.experts.{e}.up") for e in range(3)),
        *((f"mlp.experts.{e}.down",) for e in range(3)),
    }
    assert layout.groups[-3:] == [[f"mlp.experts.3.{n}"] for n in ("gate", "up", "down")]
    assert "mlp" not in layout.tails  # its output is put together from its experts'


def test_memory_that_is_used_again_is_no_shared_input():
    # the inputs of these linears are freed one by one, and take each other's place
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList(nn.Linear(fakes.WIDTH, 8) for _ in range(6))

        def forward(self, hidden_states, position):
            total = 0
            for i, step in enumerate(self.steps):
                total = total + step(hidden_states * (i + 2)).sum()
            return hidden_states + total

    model = fakes.Model([Chain()])
    assert probe(model, fakes.ids()).groups == [[f"steps.{i}"] for i in range(6)]


# -- replay -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_replay_changes_nothing(kind):
    model = tiny(kind, torch.float32)
    blocks = list(find_blocks(model).values())
    batches = list(tokens(5, 20).split(2))
    captured = capture(model, blocks, batches)
    with BlockPath(blocks[0], 0, captured, CPU) as path:
        plain = [path.run(b, h) for b, h in enumerate(captured.hidden)]
        layout = path.probe(linears_of(blocks[0]), captured.hidden[0])
        path.replay(layout.replayable)
        path.recording = set(layout.replayable)
        for _ in range(2):  # while recording, then from what was recorded
            again = [path.run(b, h) for b, h in enumerate(captured.hidden)]
            assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert all("forward" not in m.__dict__ for m in blocks[0].modules())


def test_replayed_children_do_not_run_again():
    model = fakes.model()
    block = model.layers[0]
    captured = capture(model, list(model.layers), [fakes.ids()])
    hidden = captured.hidden[0]
    with BlockPath(block, 0, captured, CPU) as path:
        path.replay({"mixer", "mlp"})
        path.run(0, hidden)
        assert (block.mixer.runs, block.mlp.runs) == (1, 1)  # nothing is kept unasked
        path.recording = {"mixer"}
        before = path.run(0, hidden)
        assert (block.mixer.runs, block.mlp.runs) == (2, 2)
        with torch.no_grad():
            block.mixer.o.weight.zero_()  # not noticed: its output is kept
        assert torch.equal(path.run(0, hidden), before)
        assert (block.mixer.runs, block.mlp.runs) == (2, 3)
        path.keep("mixer", 0, (torch.zeros_like(hidden), None))
        assert not torch.equal(path.run(0, hidden), before)
        assert block.mixer.runs == 2
        path.run(1, hidden)  # another batch is another matter
        assert block.mixer.runs == 3
    path.run(0, hidden)
    assert block.mixer.runs == 4


def test_a_run_can_end_after_a_child():
    model = fakes.model()
    block = model.layers[0]
    captured = capture(model, list(model.layers), [fakes.ids()])
    with BlockPath(block, 0, captured, CPU) as path:
        path.replay({"mixer", "mlp"})
        path.recording, path.stop_after = {"mixer"}, "mixer"
        assert path.run(0, captured.hidden[0]) is None
        assert (block.mixer.runs, block.mlp.runs) == (1, 0)
        path.stop_after = None
        assert path.run(0, captured.hidden[0]) is not None
        assert (block.mixer.runs, block.mlp.runs) == (1, 1)


def test_other_errors_are_not_swallowed():
    model = fakes.model()
    captured = capture(model, list(model.layers), [fakes.ids()])

    def stop(*_):
        raise StopForward

    path = BlockPath(model.layers[0], 0, captured, CPU)
    handle = model.layers[0].mlp.register_forward_pre_hook(stop)
    assert path.run(0, captured.hidden[0]) is None
    handle.remove()
    model.layers[0].mlp.down = nn.Linear(5, 5)
    with pytest.raises(RuntimeError):
        path.run(0, captured.hidden[0])


# -- twin -------------------------------------------------------------------


def test_a_twin_costs_no_memory_and_goes_its_own_way():
    model = tiny("llama", torch.float32)
    block = model.model.layers[0]
    copy = twin(block)
    mine, its = dict(block.named_parameters()), dict(copy.named_parameters())
    assert mine.keys() == its.keys()
    assert all(its[n].data_ptr() == p.data_ptr() for n, p in mine.items())
    assert all(a is not b for a, b in zip(block.modules(), copy.modules(), strict=True))
    kept = its["mlp.up_proj.weight"].clone()
    block.mlp.up_proj.weight = nn.Parameter(torch.zeros_like(kept), requires_grad=False)
    block.mlp.forward = None
    assert torch.equal(copy.mlp.up_proj.weight, kept)
    assert callable(copy.mlp.forward)
