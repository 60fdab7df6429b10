"""pythia.py, and what it reads by files.py, against the outputs of the reference libraries (tests/golden, see README there) and against itself done slowly."""

import gzip
import json
import os
import re
import struct
import unicodedata
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from files import CheckpointFiles, UserError, load_state, read_rows, write_json, write_whole
from policies import FeatureScale, LoRAPolicy
from pythia import (DTYPES, Linear, Pythia, PythiaConfig, Tokenizer, attention_mask, bytes_of_characters, pad, read_safetensors, read_weights,
                    sample, stream_safetensors, write_safetensors)
from run import check_finite
from sae import SAE

REPO = Path(__file__).parents[1]
GOLDEN = REPO / "tests" / "golden"
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json") if not path.parent.name.startswith("reward-"))
TOKENIZERS = {"20B": [REPO.parent / "shared/tokenizer/20B_tokenizer.json"],
              "imdb-4096": [REPO / "assets/tiny/tokenizer.json", REPO.parent / "shared/tokenizer/imdb-bpe-4096.json"]}
CONFIG = PythiaConfig(vocab_size=50, hidden_size=24, num_layers=3, num_heads=3, intermediate_size=40, rotary_pct=0.5)
MASK_BT = (torch.arange(8) >= torch.tensor([0, 2, 6])[:, None]).long()
both_forms = pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])


def random_model(**changes) -> Pythia:
    """All parameters random and large enough for every part to matter; in float64, so that no greedy choice is a tie."""
    model, generator = Pythia(PythiaConfig(**{**vars(CONFIG), **changes})).double(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        parameter.data += "norm" in name and name.endswith("weight")
    return model.requires_grad_(False).eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def naive_greedy(model, tokens_BT, new, mask_BT=None, edits=None) -> torch.Tensor:
    """Greedy continuation without a cache: the whole sequence anew for each token."""
    for _ in range(new):
        best_B1 = model(tokens_BT, mask_BT, edits)[:, -1:].argmax(-1)
        tokens_BT = torch.cat([tokens_BT, best_B1], dim=1)
        mask_BT = None if mask_BT is None else torch.cat([mask_BT, torch.ones_like(best_B1)], dim=1)
    return tokens_BT


def louder(mlp_BTD, neurons_BTM):
    """An edit that reads both of its arguments."""
    return 0.7 * mlp_BTD.flip(-1) + neurons_BTM[..., :mlp_BTD.shape[-1]]


def complaint(function, *arguments) -> str:
    """-> the message of the UserError that the call must raise, one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- the forward pass and its parts

@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_equal_transformers(name):
    model, want = Pythia.from_pretrained(GOLDEN / name, dtype=torch.float32), read_safetensors(GOLDEN / f"{name}.safetensors")
    torch.testing.assert_close(model(want["tokens_BT"]), want["logits_BTV"], atol=1e-4, rtol=0)
    for side in ("left", "right"):
        mask_BT = want[f"{side}_mask_BT"]
        logits_BTV = model(want[f"{side}_tokens_BT"], mask_BT)
        torch.testing.assert_close(logits_BTV[mask_BT == 1], want[f"{side}_logits_BTV"][mask_BT == 1], atol=1e-4, rtol=0)
    assert torch.equal(model.generate(want["tokens_BT"], 12, temperature=0), want["greedy_BT"])
    assert torch.equal(model.generate(want["left_tokens_BT"], 12, want["left_mask_BT"], temperature=0), want["left_greedy_BT"])


@both_forms
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(parallel, side):
    model, row = random_model(parallel_residual=parallel), random_tokens(6).tolist()
    tokens_BT, mask_BT = pad([row, random_tokens(10).tolist()], 7, "left")
    assert tokens_BT[0].tolist() == [7] * 4 + row and mask_BT.sum(1).tolist() == [6, 10]
    if side == "right":
        tokens_BT, mask_BT = tokens_BT.roll(-4, 1)[:1], mask_BT.roll(-4, 1)[:1]
    logits_BTV = model(tokens_BT, mask_BT)
    assert logits_BTV.isfinite().all() and (attention_mask(mask_BT, slice(0, 10), torch.float32) == 0).any(-1).all()     # not each softmax forgives no key
    alone_BTV = model(torch.tensor([row]))
    torch.testing.assert_close(logits_BTV[:1][mask_BT[:1] == 1], alone_BTV[0], atol=1e-6, rtol=0)        # angles are float32


@both_forms
@pytest.mark.parametrize("mask_BT", [None, MASK_BT], ids=["unmasked", "masked"])
def test_parts_make_the_whole_bit_for_bit(parallel, mask_BT):
    model, tokens_BT = random_model(parallel_residual=parallel), random_tokens(3, 8)
    logits_BTV, hidden_BTD = model(tokens_BT, mask_BT), model.hidden(tokens_BT, mask_BT)
    assert torch.equal(model.embed_out(hidden_BTD), logits_BTV)
    for layer in range(3):
        resid_BTD, mlp_BTD, neurons_BTM = model.trunk(tokens_BT, layer, mask_BT)
        assert torch.equal(model.forward_from(resid_BTD, layer, mask_BT), logits_BTV)
        assert torch.equal(model.hidden_from(resid_BTD, layer, mask_BT), hidden_BTD)
        torch.testing.assert_close(model.hidden_from(resid_BTD, layer, mask_BT, last=3), hidden_BTD[:, -3:], atol=1e-6, rtol=0)
        seen = []
        hook = model.gpt_neox.layers[layer].mlp.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
        model(tokens_BT, mask_BT)
        hook.remove()
        assert torch.equal(mlp_BTD, seen[0][0]) and torch.equal(neurons_BTM, seen[0][1])
        assert torch.equal(model.mlp_output(tokens_BT, layer, mask_BT), seen[0][0])


@both_forms
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_edits_add_to_the_residual_stream(parallel, layer):
    model, tokens_BT = random_model(parallel_residual=parallel), random_tokens(2, 7)
    logits_BTV, edited_BTV = model(tokens_BT), model(tokens_BT, edits={layer: louder})
    assert torch.equal(model(tokens_BT, edits={layer: lambda mlp_BTD, _: torch.zeros_like(mlp_BTD)}), logits_BTV)
    assert (edited_BTV - logits_BTV).abs().max() > 0.1
    resid_BTD, mlp_BTD, neurons_BTM = model.trunk(tokens_BT, layer)
    change_BTD = louder(mlp_BTD, neurons_BTM)
    assert torch.equal(model.forward_from(resid_BTD + change_BTD, layer), edited_BTV)
    hook = model.gpt_neox.layers[layer].register_forward_hook(lambda module, inputs, out: (out[0] + change_BTD, *out[1:]))
    assert torch.equal(model(tokens_BT), edited_BTV)             # by hand, with no code of ours but the block's
    hook.remove()
    twice = {layer: louder, 2: louder}                           # forward_from edits the layers above, and only those
    assert torch.equal(model.forward_from(resid_BTD + change_BTD, layer, edits=twice), model(tokens_BT, edits=twice))


def test_a_layer_that_does_not_exist():
    model = random_model()
    for layer in (-1, 3):
        assert f"layer {layer} does not exist" in complaint(model.mlp_output, random_tokens(1, 3), layer)
        assert "layers 0 to 2" in complaint(model.forward_from, torch.zeros(1, 3, 24, dtype=torch.float64), layer)


# ----------------------------------------------------------------------------------------------------------------- generation

@both_forms
@pytest.mark.parametrize("edits", [None, {1: louder}, {0: louder, 2: louder}], ids=["unedited", "edit", "edits"])
def test_cached_generation_equals_uncached(parallel, edits):
    model, tokens_BT = random_model(parallel_residual=parallel), random_tokens(3, 8)
    for mask_BT in (None, MASK_BT):
        generated_BT = model.generate(tokens_BT, 15, mask_BT, temperature=0, edits=edits)
        assert torch.equal(generated_BT, naive_greedy(model, tokens_BT, 15, mask_BT, edits))
        assert not edits or not torch.equal(generated_BT, model.generate(tokens_BT, 15, mask_BT, temperature=0))
    alone_BT = model.generate(tokens_BT[1:2, 2:], 15, temperature=0, edits=edits)
    assert torch.equal(alone_BT[0], generated_BT[1, 2:])         # a row's padding and neighbours change nothing
    with pytest.raises(ValueError, match="left-padded"):
        model.generate(tokens_BT, 15, MASK_BT.flip(1), edits=edits)


class PretendGraph(TorchDispatchMode):
    """A CUDA graph without CUDA: within it operations are recorded, and what they changed is taken back; `replay` does them again, on the
    same tensors. As there, no value may be asked for, and no shape depend on one."""

    def __init__(self):
        super().__init__()
        self.calls, self.changed, self.replays, self.recording = [], [], 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), "not in a graph"
        changed = [(x, x.clone()) for x, told in zip(args, func._schema.arguments) if told.alias_info and told.alias_info.is_write]
        out = func(*args, **kwargs or {})
        self.changed += [(x, before) for x, before in changed if x.shape == before.shape]        # not unsqueeze_, which squeeze_ takes back
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __enter__(self):
        self.recording = True
        return super().__enter__()

    def __exit__(self, *error):
        self.recording = False
        super().__exit__(*error)
        for x, before in reversed(self.changed):
            x.copy_(before)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, kept in self.calls:
            out = func(*args, **kwargs)
            if not any(told.alias_info for told in func._schema.returns):        # neither a view nor an input, which are up to date
                for x, new in zip(*[out if isinstance(out, tuple) else (out,) for out in (kept, out)]):
                    x.copy_(new.reshape(x.shape)) if isinstance(x, torch.Tensor) else None


def scaled_features() -> FeatureScale:
    edit = FeatureScale(SAE(24, 48, torch.Generator().manual_seed(0)).double())
    edit.coef_F.data += torch.randn(48, generator=torch.Generator().manual_seed(1))
    return edit


def with_adapters() -> Pythia:
    model = LoRAPolicy(random_model(), 2, ("dense",), torch.Generator().manual_seed(0)).model
    for name, p in model.named_parameters():
        p.data += 0.3 * name.endswith("B_KD")
    return model


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 14])
def test_sampling_by_a_graph_draws_and_records_the_same(monkeypatch, temperature, new):
    tokens_BT, graphs = random_tokens(3, 8), []
    for model, mask_BT, edits in ((random_model(), None, None), (random_model(), MASK_BT, {1: louder, 2: louder}), (with_adapters(), None, None),
                                  (random_model(), MASK_BT, {0: scaled_features(), 1: scaled_features()})):
        record, other = [], []
        with monkeypatch.context() as patch:
            patch.setattr("pythia.use_graphs", lambda device: True)
            patch.setattr("sae.capturing", lambda x: bool(graphs) and graphs[-1].recording)
            patch.setattr("torch.cuda.CUDAGraph", lambda: graphs.append(PretendGraph()) or graphs[-1])
            patch.setattr("torch.cuda.graph", lambda graph: graph)
            drawn_BT = model.generate(tokens_BT, new, mask_BT, temperature, edits, torch.Generator().manual_seed(3), record)
        assert torch.equal(drawn_BT, model.generate(tokens_BT, new, mask_BT, temperature, edits, torch.Generator().manual_seed(3), other))
        assert len(record) == len(other) == (new if edits else 0)
        for triple, same in zip(record, other):
            torch.testing.assert_close(triple, same)
    assert [graph.replays for graph in graphs] == 4 * [new - 2] * (new > 2)


def test_sampling_is_repeatable_and_uniforms_belong_to_rows():
    model, tokens_BT = random_model(), random_tokens(3, 4)
    only_first = {1: lambda mlp_BTD, _: torch.cat([5 + mlp_BTD[:1], torch.zeros_like(mlp_BTD[1:])])}
    first_BT, second_BT, other_BT, edited_BT = (
        model.generate(tokens_BT, 10, edits=edits, generator=torch.Generator().manual_seed(seed))
        for seed, edits in ((5, None), (5, None), (6, None), (5, only_first)))
    assert torch.equal(first_BT, second_BT) and not torch.equal(first_BT, other_BT) and torch.equal(first_BT[:, :4], tokens_BT)
    assert torch.equal(edited_BT[1:], first_BT[1:]) and not torch.equal(edited_BT[0], first_BT[0])
    assert torch.equal(model.generate(tokens_BT, 0), tokens_BT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_softmax(temperature):
    model, prompt_BT, N = random_model(vocab_size=9), torch.tensor([[1, 2, 3]]), 20_000
    expected_V = N * (model(prompt_BT)[0, -1] / temperature).softmax(-1)
    drawn_BT = model.generate(prompt_BT.expand(N, 3), 1, temperature=temperature, generator=torch.Generator().manual_seed(0))
    count_V = drawn_BT[:, -1].bincount(minlength=9)
    chi_square = ((count_V - expected_V) ** 2 / expected_V).sum()
    assert chi_square < 35, (count_V, expected_V)                # 8 degrees of freedom: p < 3e-5


def test_probability_zero_is_never_drawn_and_temperature_zero_takes_the_best(monkeypatch):
    logits_V = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -200.0, -torch.inf])          # −200 underflows in float32
    uniform_N = torch.cat([torch.tensor([2.0 ** -24, 1 - 2.0 ** -24, 1.0]), 1 - torch.rand(10_000)])
    drawn_N = sample(logits_V.expand(len(uniform_N), -1), 1.0, uniform_N)
    assert set(drawn_N.tolist()) == {1, 3} and drawn_N[:3].tolist() == [1, 3, 3]
    logits_BV = torch.randn(20, 50_304, generator=torch.Generator().manual_seed(0))
    logits_BV[:, 40_000:] = -torch.inf
    assert (logits_BV.softmax(-1).cumsum(-1)[:, -1] < 1).any() and (sample(logits_BV, 1.0, torch.ones(20)) < 40_000).all()
    assert torch.equal(sample(logits_BV, 0, torch.rand(20)), logits_BV.argmax(-1))
    assert (sample(torch.full((20, 7), torch.nan), 1.0, torch.rand(20)) < 7).all()           # an index that exists: NaN is found later
    model = random_model()
    model.gpt_neox.final_layer_norm.weight.zero_()
    model.embed_out.weight[0] = -1e4 * model.gpt_neox.final_layer_norm.bias                  # token 0 is impossible
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))                 # the least that rand can draw
    assert model.generate(random_tokens(2, 3), 5)[:, 3:].min() > 0


# --------------------------------------------------------------------------------------------------- checkpoints and configs

@pytest.fixture
def checkpoint(tmp_path):
    """-> a function that writes the golden model `parallel` with tensors changed (None: left out) and returns its folder."""
    def write(changes: dict) -> Path:
        tensors = {**read_safetensors(GOLDEN / "parallel" / "model.safetensors"), **changes}
        write_safetensors(tmp_path / "model.safetensors", {name: value for name, value in tensors.items() if value is not None})
        (tmp_path / "config.json").write_bytes((GOLDEN / "parallel" / "config.json").read_bytes())
        return tmp_path
    return write


BIAS = "gpt_neox.layers.1.attention.dense.bias"


@pytest.mark.parametrize("changes, words", [
    ({BIAS: None}, ["lacks 1 tensor", BIAS]), ({"embed_out.weight": None}, ["lacks 1 tensor", "embed_out.weight"]),
    ({"score.weight": torch.ones(2)}, ["unknown 1 tensor", "score.weight"]),
    ({"gpt_neox.layers.2.mlp.dense_h_to_4h.bias": torch.ones(64)}, ["unknown 1 tensor", "layers.2.mlp"]),
    ({BIAS: torch.ones(31)}, [BIAS, "(31,)", "(32,)"]), ({BIAS: torch.ones(1, 32)}, [BIAS, "(1, 32)", "(32,)"]),
], ids=str)
def test_loading_names_missing_extra_and_misshapen_tensors(checkpoint, changes, words):
    message = complaint(Pythia.from_pretrained, checkpoint(changes))
    assert all(word in message for word in words), message


def test_loading_skips_legacy_buffers_and_leaves_the_file(checkpoint):
    prefix, tokens_BT = "gpt_neox.layers.0.attention.", random_tokens(2, 6)
    folder = checkpoint({prefix + "bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), prefix + "masked_bias": torch.tensor(-1e9),
                         prefix + "rotary_emb.inv_freq": torch.full((4,), torch.nan)})
    model, size = Pythia.from_pretrained(folder), (folder / "model.safetensors").stat().st_size
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    (folder / "model.safetensors").write_bytes(bytes(size))      # overwritten in place, as a memory mapping would notice
    assert torch.equal(model(tokens_BT), Pythia.from_pretrained(GOLDEN / "parallel")(tokens_BT))


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_again_bit_for_bit(name, tmp_path):
    model, tokens_BT = Pythia.from_pretrained(GOLDEN / name), random_tokens(2, 6)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert ("embed_out.weight" in read_safetensors(tmp_path / "new/folder/model.safetensors")) != model.cfg.tie_embeddings
    assert json.loads((tmp_path / "new/folder/config.json").read_text())["dtype"] == str(model.dtype).removeprefix("torch.")
    again = Pythia.from_pretrained(tmp_path / "new" / "folder")
    assert again.cfg == model.cfg and again.dtype == model.dtype and torch.equal(model(tokens_BT), again(tokens_BT))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert (again.embed_out.weight is again.gpt_neox.embed_in.weight) == model.cfg.tie_embeddings


def test_what_is_not_there_is_named(tmp_path):
    for load, name in (Pythia.from_pretrained, "config.json"), (Tokenizer.from_pretrained, "tokenizer.json"):
        assert complaint(load, "no-such-model").startswith("model 'no-such-model' not found") and "tiny" in complaint(load, "a/b/c")
        assert complaint(load, "pythia-0b").startswith(f"{name} of EleutherAI/pythia-0b (main)") and "HF_HUB_OFFLINE" in complaint(load, "x/y")
        assert f"{tmp_path}: has no {name}" == complaint(load, tmp_path)
    write_json(tmp_path / "config.json", CONFIG.to_json(torch.float32))
    assert f"{tmp_path}: has neither model.safetensors nor pytorch_model.bin" in complaint(Pythia.from_pretrained, tmp_path)
    for file in "model.safetensors.index.json", "pytorch_model.bin.index.json":
        for names, word in ({"a": "shard"}, f"{tmp_path}: has no shard"), ({"a": "../b"}, file), ({"a": 3}, file), ([], file):
            write_json(tmp_path / file, {"weight_map": names})
            assert word in complaint(Pythia.from_pretrained, tmp_path)
        write_json(tmp_path / file, [])
        assert file in complaint(Pythia.from_pretrained, tmp_path)
        (tmp_path / file).unlink()


def test_config_reads_old_and_new_field_names():
    cfg = PythiaConfig(vocab_size=50, hidden_size=24, num_layers=3, num_heads=3, intermediate_size=40, max_positions=99,
                       rotary_pct=0.5, rotary_base=123.0, layer_norm_eps=1e-3, parallel_residual=False, tie_embeddings=True)
    written = cfg.to_json(torch.bfloat16)
    old_only, new_only = {"rotary_pct", "rotary_emb_base", "torch_dtype"}, {"rope_parameters", "dtype"}
    assert old_only | new_only < written.keys() and written["dtype"] == written["torch_dtype"] == "bfloat16"
    for left_out in (set(), old_only, new_only):
        assert PythiaConfig.from_json({key: value for key, value in written.items() if key not in left_out}) == cfg


@pytest.mark.parametrize("change, word", [
    ({"model_type": "llama"}, "'llama'"), ({"model_type": None}, "gpt_neox"), ({"hidden_act": "gelu_new"}, "GELU"),
    ({"attention_bias": False}, "biases"), ({"hidden_size": 25}, "3 heads"), ({"num_hidden_layers": 0}, "positive"),
    ({"vocab_size": "9"}, "sizes"), ({"rope_parameters": {"rope_type": "yarn"}}, "rotary"),
    ({"hidden_size": 10 ** 9}, "below"), ({"num_hidden_layers": 10 ** 6}, "at most 1000"), ({"num_attention_heads": True}, "sizes"),
    ({"layer_norm_eps": float("inf")}, "positive"), ({"rope_parameters": {"partial_rotary_factor": float("inf")}}, "malformed"),
    ({"rope_parameters": {"rope_theta": 10 ** 400}}, "malformed"), ({"rope_parameters": {"rope_theta": float("nan")}}, "positive"),
    ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "even"), ({"rope_parameters": {"rope_theta": "x"}}, "malformed"),
    ({"use_parallel_residual": "false"}, "true or false"), ({"tie_word_embeddings": 1}, "true or false"),
], ids=str)
def test_config_refuses_other_architectures_and_malformed_fields(change, word):
    told = complaint(PythiaConfig.from_json, CONFIG.to_json(torch.float32) | change, "x/config.json")
    assert word in told and told.startswith("x/config.json: ")
    for no_config in (None, [], "gpt_neox", {}, {"model_type": "gpt_neox"}):
        assert complaint(PythiaConfig.from_json, no_config, "x/config.json").startswith("x/config.json: ")


# ---------------------------------------------------------------------------------------------------------------- safetensors

def test_safetensors_round_trip(tmp_path):
    values = torch.randint(-100, 100, (5, 6), generator=torch.Generator().manual_seed(0))
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES.values()}
    tensors |= {"sevenths": (values / 7).to(torch.bfloat16), "odd": torch.tensor([torch.nan, -torch.inf, -0.0]),
                "ünï": values[0, :1], "0-dim": torch.tensor(3.5), "empty": torch.empty(0), "empty too": torch.ones(3, 0, 2).int(), "empty and long": torch.ones(10 ** 6, 0),
                "transposed": values.T, "strided": values[::2, 1::2], "expanded": values[:1].expand(4, 6)}
    write_safetensors(tmp_path / "file", tensors)
    for value in read_safetensors(tmp_path / "file").values():
        value.zero_()                                            # stays in memory: the file is as it was
    again = read_safetensors(tmp_path / "file")
    assert again.keys() == tensors.keys() and [path.name for path in tmp_path.iterdir()] == ["file"]     # no temporary file left
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].flatten().view(torch.uint8), tensor.flatten().contiguous().view(torch.uint8)), name
    write_safetensors(tmp_path / "file", {})
    assert read_safetensors(tmp_path / "file") == {}


def test_safetensors_cut_anywhere_or_too_long(tmp_path):
    path = tmp_path / "file"
    write_safetensors(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int16)})
    whole = path.read_bytes()
    for damaged in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
        path.write_bytes(damaged)
        assert complaint(read_safetensors, path).startswith(f"{path}: not a whole safetensors file")


def entry(begin, stop, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - begin) // 4] if shape is None else shape, "data_offsets": [begin, stop]}


@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (64, 1, 24), (65, 1, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_linear_whatever_the_rows(shape, bias):
    layer, x = Linear(24, 7, bias=bias), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-5)
    assert torch.equal(layer(x).detach(), torch.nn.functional.linear(x, layer.weight, layer.bias).detach())


def test_a_streamed_file_is_never_in_memory_as_a_whole(tmp_path):
    """Loading must not hold a checkpoint beside its copy: 6.9 B parameters would need twice their 14 GB."""
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 4 * 2 ** 20
    write_safetensors(tmp_path / "file", {str(i): torch.full((size // 4,), float(i)) for i in range(16)})
    peaks = []
    for streamed in (True, False):
        before, peak = resident(), 0
        for i, (_, tensor) in enumerate(stream_safetensors(tmp_path / "file") if streamed else read_safetensors(tmp_path / "file").items()):
            assert tensor.sum() == i * (size // 4)
            peak = max(peak, resident() - before)
        peaks.append(peak / size)
    assert peaks[0] < 4 < 14 < peaks[1]


def raw_file(path: Path, header, data: bytes, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def test_safetensors_in_another_order_without_metadata(tmp_path):
    header = {"late": entry(8, 12), "early": entry(0, 8), "none": entry(8, 8)}
    tensors = read_safetensors(raw_file(tmp_path / "file", header, struct.pack("<3f", 1, 2, 3)))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"early": [1, 2], "none": [], "late": [3]}


LIES = {
    "small shape": {"a": entry(0, 8, [1])}, "large shape": {"a": entry(0, 8, [3])}, "beyond the file": {"a": entry(0, 12)},
    "dtype": {"a": entry(0, 8, [2], "F16")}, "overlap": {"a": entry(0, 8), "b": entry(4, 8)}, "unused end": {"a": entry(0, 4)},
    "same place": {"a": entry(0, 8), "b": entry(0, 8)}, "hole": {"a": entry(0, 2, [2], "U8"), "b": entry(4, 8)},
    "late": {"a": entry(4, 8)}, "unknown dtype": {"a": entry(0, 8, [8], "Q8")}, "backwards": {"a": entry(8, 0, [2])},
    "before": {"a": entry(-8, 0, [2])}, "negative": {"a": entry(0, 8, [-1, -2])}, "fractional shape": {"a": entry(0, 8, [2.0])},
    "no list": {"a": entry(0, 8, 2)}, "text offsets": {"a": {**entry(0, 8), "data_offsets": ["0", "8"]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}}, "three offsets": {"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}},
    "no entry": {"a": 3}, "list": [], "null": None, "nothing": b"",
    "float offsets": {"a": {**entry(0, 8), "data_offsets": [0, 8.0]}}, "bool offsets": {"a": {**entry(0, 8), "data_offsets": [False, 8]}},
    "bool shape": {"a": entry(0, 8, [True, 2])}, "huge shape": {"a": entry(0, 8), "b": entry(8, 8, [0, 2 ** 70])},
    "endless shape": {"a": entry(0, 8, [0] + [8] * 100_000)}, "many dimensions": {"a": entry(0, 8, [2] + [1] * 8)},
    "name twice": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "key twice": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "long name": {"a" * 100_000: entry(0, 12)}, "UTF-16": json.dumps({"a": entry(0, 8)}).encode("utf-16"), "constant": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
    "long number": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 8]}}', "10 MB": b"[" + b"0," * 5_000_000 + b"0]",
    "no JSON": b"{'a': 1}", "no UTF-8": b'{"\xff": 1}', "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("header, length", [(header, None) for header in LIES.values()] + [({}, 2 ** n) for n in (7, 30, 63)],
                         ids=[*LIES, "long header", "longer header", "longest header"])
def test_safetensors_header_that_lies(tmp_path, header, length):
    path = raw_file(tmp_path / "file", header, bytes(8), length)
    told = complaint(read_safetensors, path)
    assert told.startswith(f"{path}: not a whole safetensors file") and len(told) < 500 + len(str(path))


def test_check_finite_names_what_is_not():
    check_finite("here", loss=1.0, activation=torch.ones(3))
    for value in (torch.tensor([1, torch.nan]), torch.tensor([-torch.inf]), float("nan")):
        with pytest.raises(UserError, match="sae, step 3: loss is NaN or infinite"):
            check_finite("sae, step 3", first=1.0, loss=value, last=value)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]                       # the last has no gradient
    parameters[0].grad, parameters[1].grad = torch.ones(2), torch.ones(2)
    big = torch.nn.Parameter(torch.zeros(2000, dtype=torch.float16))
    big.grad = torch.full_like(big, 6e4)             # whose norm is no float16
    check_finite("x", torch.optim.SGD([*parameters, big]))
    parameters[1].grad = torch.tensor([0, torch.inf])
    assert "gradient" in complaint(check_finite, "x", torch.optim.SGD(parameters))


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: RuntimeError("torch.save's own")], ids=["plain", "wrapped"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, wrap):
    path = tmp_path / "file"
    path.write_bytes(b"whole")

    def write(file):
        file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise wrap(error) from None
    told = complaint(write_whole, path, write)
    assert told.startswith(f"{path}: cannot be written (No space left on device); what was saved before is whole")
    assert path.read_bytes() == b"whole" and [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["../secret", "..", "", "./secret", "a/../../secret", "/etc/passwd", ".hidden", "secret\0", 3, None])
def test_an_index_cannot_point_outside_its_folder(tmp_path, name):
    write_safetensors(tmp_path / "secret", {"a": torch.ones(1)})
    (tmp_path / "in").mkdir()
    write_json(tmp_path / "in" / "model.safetensors.index.json", {"weight_map": {"a": name}})
    assert "has no weight_map of plain file names" in complaint(lambda: list(read_weights(CheckpointFiles(tmp_path / "in"))))


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 3}, {1: torch.ones(1)}, torch.ones(1), {"a": {"b": torch.ones(1)}}, None])
def test_pickles_hold_tensors_by_name_or_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "something else than tensors by name" in complaint(lambda: list(read_weights(CheckpointFiles(tmp_path))))


class Evil:
    """What unpickles as a call of a function."""
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_pickles_of_old_load_too(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert dict(read_weights(CheckpointFiles(tmp_path)))["a"].tolist() == [0, 1, 2]
    assert complaint(load_state, tmp_path / "none.pt").endswith("none.pt: no such file")
    assert "cannot be read (Is a directory)" in complaint(load_state, tmp_path)          # not: broken


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    assert "not readable as tensors" in complaint(lambda: list(read_weights(CheckpointFiles(tmp_path))))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("data, told", [
    (b'{"a": 1}\n\n{"a":', "line 3"), (b'{"a": 1}\n[]\n', "line 2"), (b'{"a": 1}\n{"a": "\xff"}\n', "line 2"), (b"[" * 100_000, "line 1"),
    (b"9" * 10_000, "line 1"), (b'{"a": 1}\n\0', "line 2"),
    (gzip.compress(b'{"a": 1}\n', mtime=0)[:-9], "gzip"), (gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 20, "gzip"), (b"no gzip", "gzip")])
def test_bad_rows_are_refused_with_their_line(tmp_path, data, told):
    path = tmp_path / ("rows.jsonl.gz" if told == "gzip" else "rows.jsonl")
    path.write_bytes(data)
    assert (told if told != "gzip" else "not readable") in complaint(read_rows, path)


# ------------------------------------------------------------------------------------------------------------------ tokenizer

@pytest.fixture(scope="module", params=TOKENIZERS)
def golden_tokenizer(request):
    """-> a Tokenizer and the (text, ids) rows that the tokenizers library gave for it."""
    path = next((path for path in TOKENIZERS[request.param] if path.exists()), None)
    if path is None:
        pytest.skip(f"no tokenizer file for {request.param} here: it is not part of the repository")
    rows = (GOLDEN / f"tokenizer-{request.param}.jsonl").read_text(encoding="utf-8").splitlines()
    return Tokenizer.from_pretrained(path), [(row["text"], row["ids"]) for row in map(json.loads, rows)]


def test_ids_equal_those_of_tokenizers_and_decode_back(golden_tokenizer, tmp_path):
    tokenizer, rows = golden_tokenizer
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path / "tokenizer.json")
    for text, ids in rows:
        assert tokenizer.encode(text) == again.encode(text) == ids, ascii(text)
        parts = re.split(r"(<\|endoftext\|>|<\|padding\|>)", text)               # marks after a special token do not join it
        assert tokenizer.decode(ids) == "".join(unicodedata.normalize("NFC", part) for part in parts), ascii(text)
    assert tokenizer.end_of_text == 0 and tokenizer.vocab_size == 1 + max(tokenizer.known_ids)


def test_decode_ignores_unknown_ids_and_survives_broken_bytes(golden_tokenizer):
    tokenizer, _ = golden_tokenizer
    ids, unknown = tokenizer.encode("a film 😀 b"), [-1, tokenizer.vocab_size, tokenizer.vocab_size + 49, 10 ** 9]
    assert tokenizer.decode([unknown[0], *ids[:2], *unknown, *ids[2:]]) == tokenizer.decode(torch.tensor(ids)) == "a film 😀 b"
    assert tokenizer.decode(unknown) == "" and "\ufffd" in tokenizer.decode(tokenizer.encode("x😀")[:-1])


def test_tokenizer_refuses_other_kinds():
    vocab = bytes_of_characters()                                # the id of a byte is its value
    config = {"model": {"type": "BPE", "vocab": vocab}, "normalizer": None,
              "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True}],
              "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    assert Tokenizer(config).encode("a<|endoftext|>a") == [97, 256, 97]
    end = config["added_tokens"][0]
    for change in ({"added_tokens": [end, {**end, "content": "", "id": 9000}]}, {"added_tokens": [end, {**end, "content": 5, "id": 9000}]},
                   {"added_tokens": [{**end, "id": 2 ** 64}]}, {"added_tokens": [end, {**end, "content": "\ud800", "id": 9000}]},
                   {"model": {"type": "BPE", "vocab": {c: i for c, i in vocab.items() if c != "a"}}},          # a byte that is no token: a panic in tiktoken
                   *({"model": {"type": "BPE", "vocab": vocab | {"aa": number}, "merges": ["a a"]}} for number in (2 ** 32, True)),
                   {"model": {"type": "BPE", "vocab": vocab | {"aa": 257}}},                                   # which no merge makes
                   *({"added_tokens": [end, {**end, "content": "<x>", "id": 257, flag: True}]} for flag in ("lstrip", "rstrip", "single_word")),
                   {"model": {"type": "WordPiece", "vocab": vocab}}, {"model": {"type": "BPE", "vocab": vocab | {"日": 257}}},
                   {"model": None}, {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
                   {"model": {"type": "BPE", "vocab": vocab | {"ab": 257, "bc": 258}, "merges": ["b c", "a b"]}}, {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
                   {"normalizer": {"type": "NFKC"}}, {"added_tokens": []}):
        assert complaint(Tokenizer, config | change, "x/tokenizer.json").startswith("x/tokenizer.json: ")


def test_added_tokens_are_found_before_or_after_normalisation_as_their_flag_says():
    """What the tokenizers library (0.23.3) gives for the same file: "éé" in four characters is the token only where that is normalized."""
    config = {"model": {"type": "BPE", "vocab": bytes_of_characters()}, "normalizer": {"type": "NFC"},
              "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    end = {"id": 256, "content": "<|endoftext|>", "special": True, "normalized": False}
    for flags, ids in (({"special": True, "normalized": True}, [97, 257]), ({"special": False, "normalized": False}, [97, *"éé".encode()]),
                       ({"special": False}, [97, 257]), ({"special": True}, [97, *"éé".encode()])):
        assert Tokenizer(config | {"added_tokens": [end, {"id": 257, "content": "éé", **flags}]}).encode("ae\u0301e\u0301") == ids


def test_more_white_space_than_tiktoken_bears_is_one_line():
    tokenizer = Tokenizer.from_pretrained("tiny")
    assert tokenizer.encode("a" + "\n" * 499_999 + "b")[1:-1] == tokenizer.encode("\n") * 499_999
    assert "white spaces in a row" in complaint(tokenizer.encode, "a" + "\n" * 1_100_000)
    assert len(tokenizer.encode(" " * 1_200_000)) == 50_000          # added tokens cut runs of spaces: here of 24
    assert len(tokenizer.encode(("a" + "\n" * 100_000) * 8)) == 800_008
