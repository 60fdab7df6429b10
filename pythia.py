"""GPT-NeoX, the architecture of Pythia, written by hand: model, generation, tokenizer, checkpoints.

The whole model is here, one class a part, smallest first; parameters are named as in the published checkpoints.

Dimension key (suffixes of tensor names, after Shazeer):
    B batch   T tokens   S tokens attended to (with a cache: past and present)   R response tokens
    D hidden size   H heads   K head size   M MLP neurons   L layers   V vocabulary

References:
    GPT-NeoX-20B, Black et al. 2022, arXiv:2204.06745
    Pythia, Biderman et al. 2023, arXiv:2304.01373
    RoFormer (rotary embeddings), Su et al. 2021, arXiv:2104.09864
"""

import copy
import functools
import json
import math
import mmap
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from files import WEIGHTS, CheckpointFiles, UserError, load_state, read_json, reading, write_json, write_whole

Edits = dict[int, Callable[[Tensor, Tensor], Tensor]]            # layer -> edit(mlp_BTD, neurons_BTM) -> change_BTD, see Pythia

END_OF_TEXT = "<|endoftext|>"


# ------------------------------------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class PythiaConfig:
    """The shape of a GPT-NeoX model. Field names are ours; `from_json` reads those of old and new config.json files."""

    vocab_size: int                      # V, rows of the embedding; more than the tokenizer has, padded for speed
    hidden_size: int                     # D
    num_layers: int
    num_heads: int                       # H; the head size K is hidden_size / num_heads
    intermediate_size: int               # M
    max_positions: int = 2048            # tokens of context the model was trained on
    rotary_pct: float = 0.25             # share of each head's dimensions that rotary embeddings turn
    rotary_base: float = 10_000.0
    layer_norm_eps: float = 1e-5
    parallel_residual: bool = True       # x + attn(ln1 x) + mlp(ln2 x), as every Pythia; else mlp sees x + attn
    tie_embeddings: bool = False         # embed_out shares the weight of embed_in

    def __post_init__(self):
        sizes = (self.vocab_size, self.hidden_size, self.num_layers, self.num_heads, self.intermediate_size, self.max_positions)
        if not all(type(size) is int and 0 < size < 2 ** 24 for size in sizes) or self.num_layers > 1000:
            raise UserError(f"model config: sizes must be positive whole numbers below 2 ** 24, layers at most 1000, found {sizes}")
        if not type(self.parallel_residual) is type(self.tie_embeddings) is bool:
            raise UserError("model config: use_parallel_residual and tie_word_embeddings must be true or false")
        if self.hidden_size % self.num_heads:
            raise UserError(f"model config: hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        if not all(math.isfinite(value) and value > 0 for value in (self.layer_norm_eps, self.rotary_base)):
            raise UserError(f"model config: layer_norm_eps {self.layer_norm_eps} and rotary base {self.rotary_base} must be positive")
        if not 0 < self.rotary_pct <= 1 or self.rotary_dims % 2:
            raise UserError(f"model config: rotary_pct {self.rotary_pct} turns {self.rotary_dims} of {self.head_size} dimensions "
                            "of a head; it must be an even number of them, in (0, 1]")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rotary_dims(self) -> int:
        return int(self.head_size * self.rotary_pct)

    @classmethod
    def from_json(cls, config: dict, source: object = "config.json") -> "PythiaConfig":
        """Read a GPT-NeoX config.json, with the field names of transformers up to 4 or from 5 on."""
        with reading(source, "missing or malformed field"):
            if config.get("model_type") != "gpt_neox":
                raise UserError(f"{source}: model_type is {config.get('model_type')!r}; only gpt_neox models (Pythia) are supported")
            rope = config.get("rope_parameters") or {}
            if (config.get("hidden_act", "gelu") != "gelu" or not config.get("attention_bias", True)
                    or rope.get("rope_type", "default") != "default" or config.get("rope_scaling")):
                raise UserError(f"{source}: only exact GELU, attention with biases and plain rotary embeddings are supported, as in Pythia")
            fields = {ours: config[theirs] for theirs, ours in CONFIG_NAMES.items() if theirs in config}
            fields |= {ours: rope[theirs] for theirs, ours in ROPE_NAMES.items() if theirs in rope}
            try:
                return cls(**fields)
            except UserError as error:
                raise UserError(f"{source}: {error}") from None

    def to_json(self, dtype: torch.dtype) -> dict:
        """The config.json that every version of transformers reads: both spellings of the rotary fields and of the dtype."""
        fields, rope = ({theirs: getattr(self, ours) for theirs, ours in names.items()} for names in (CONFIG_NAMES, ROPE_NAMES))
        dtype_name = str(dtype).removeprefix("torch.")
        return {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **fields, "hidden_act": "gelu",
                "rope_parameters": {"rope_type": "default", **rope}, "bos_token_id": 0, "eos_token_id": 0,
                "torch_dtype": dtype_name, "dtype": dtype_name}


# Names in config.json -> ours; those of "rope_parameters", where transformers keeps the rotary fields from version 5 on.
CONFIG_NAMES = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
                "num_attention_heads": "num_heads", "intermediate_size": "intermediate_size", "max_position_embeddings": "max_positions",
                "rotary_pct": "rotary_pct", "rotary_emb_base": "rotary_base", "layer_norm_eps": "layer_norm_eps",
                "use_parallel_residual": "parallel_residual", "tie_word_embeddings": "tie_embeddings"}
ROPE_NAMES = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_base"}


# -------------------------------------------------------------------------------------------------------------------- model

Positions = slice | Tensor               # of tokens; a tensor of one, (1,), where a CUDA graph is to find another value each time it is run


class Rotary:
    """Turn pair i of the n = rotary_dims / 2 pairs (a, b) of a query's or key's dimensions by the angle position · base^(−i/n), so that
    attention depends on distances alone. `a` is the first half of the rotated dimensions and `b` the second; the rest passes through.
    """

    def __init__(self, cfg: PythiaConfig, num_positions: int, device: torch.device, dtype: torch.dtype):
        # In float32 whatever the model's dtype: old checkpoints hold a float16 copy of inv_freq that is too coarse.
        exponent = torch.arange(0, cfg.rotary_dims, 2, device=device, dtype=torch.float32) / cfg.rotary_dims
        angle_TP = torch.outer(torch.arange(num_positions, device=device, dtype=torch.float32), float(cfg.rotary_base) ** -exponent)
        pairs, rest = cfg.rotary_dims // 2, cfg.head_size - cfg.rotary_dims
        # P: pairs. The minus is that of a cos − b sin, as cos −x = cos x; what passes through is turned by 0.
        angle_TK = F.pad(torch.cat([-angle_TP, angle_TP], dim=1), (0, rest))
        self.cos_T11K, self.sin_T11K = (x_TK[:, None, None].to(dtype) for x_TK in (angle_TK.cos(), angle_TK.sin()))
        self.parts = (pairs, pairs, rest)

    def at(self, where: Positions) -> "Rotary":
        """-> the same for the tokens at `where` alone."""
        part = copy.copy(self)
        part.cos_T11K, part.sin_T11K = self.cos_T11K[where], self.sin_T11K[where]
        return part

    def __call__(self, x_BTH2K: Tensor) -> Tensor:
        """Turn queries and keys (2) of all T tokens -> (a cos − b sin, b cos + a sin, rest)."""
        a, b, rest = x_BTH2K.split(self.parts, dim=-1)
        return x_BTH2K * self.cos_T11K + torch.cat([b, a, rest], dim=-1) * self.sin_T11K        # on a CPU faster than by parts, which are short


class KVCache:
    """Keys and values of all past tokens, allocated once for the final length: key_LBHSK and value_LBHSK, L layers."""

    def __init__(self, cfg: PythiaConfig, batch: int, max_tokens: int, device: torch.device, dtype: torch.dtype):
        shape = (2, cfg.num_layers, batch, cfg.num_heads, max_tokens, cfg.head_size)
        self.key_LBHSK, self.value_LBHSK = torch.zeros(shape, device=device, dtype=dtype)      # not empty: what is masked must not be NaN, either
        self.rotary = Rotary(cfg, max_tokens, device, dtype)
        self.where: Positions = slice(0, 0)          # of the tokens that are being run

    def append(self, layer: int, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of `layer` -> keys and values of all tokens so far, or (`where` a tensor) that there is room for, as views."""
        key_BHSK, value_BHSK = self.key_LBHSK[layer], self.value_LBHSK[layer]
        key_BHSK[:, :, self.where], value_BHSK[:, :, self.where] = key_BHTK, value_BHTK
        stop = self.where.stop if isinstance(self.where, slice) else None
        return key_BHSK[:, :, :stop], value_BHSK[:, :, :stop]


class Linear(nn.Linear):
    """nn.Linear. For one token each of a few rows, as in sampling, it computes (W xᵀ)ᵀ on a CPU, whose BLAS then reads the weights faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > 1 or len(x) > 64 or torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        columns = x.flatten(0, -2).T
        out = self.weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], self.weight, columns)
        return out.T.reshape(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Causal multi-head attention with rotary position embeddings."""

    def __init__(self, cfg: PythiaConfig, layer: int):
        super().__init__()
        self.num_heads, self.layer = cfg.num_heads, layer
        self.query_key_value = Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.dense = Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend_BHTS: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, D = x_BTD.shape
        # The fused projection is laid out (head, [q k v], head size), not (q k v, head, head size) as elsewhere: read it
        # the other way round and everything still runs, on garbage.
        qkv_BTH3K = self.query_key_value(x_BTD).view(B, T, self.num_heads, 3, -1)
        qk_BTH2K, value_BTH1K = qkv_BTH3K.split((2, 1), dim=3)
        query_BHTK, key_BHSK, value_BHSK = (x_BTHK.transpose(1, 2) for x_BTHK in (*rotary(qk_BTH2K).unbind(3), value_BTH1K.squeeze(3)))
        if cache:
            key_BHSK, value_BHSK = cache.append(self.layer, key_BHSK, value_BHSK)
        # Softmax runs in float32 inside. A single new token sees all that is cached, so only T > 1 needs the causal mask; it comes while the
        # cache is empty, for `is_causal` aligns queries with the first keys.
        mixed_BHTK = F.scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK, attn_mask=attend_BHTS,
                                                    is_causal=attend_BHTS is None and T > 1)
        return self.dense(mixed_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two projections with an exact GELU between; the neurons are what the GELU gives."""

    def __init__(self, cfg: PythiaConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.dense_4h_to_h = Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        neurons_BTM = F.gelu(self.dense_h_to_4h(x_BTD))            # exact (erf) GELU
        return self.dense_4h_to_h(neurons_BTM), neurons_BTM


class Block(nn.Module):
    """x + attn(ln1 x) + mlp(ln2 x); sequential (not Pythia): h = x + attn(ln1 x), then h + mlp(ln2 h)."""

    def __init__(self, cfg: PythiaConfig, layer: int):
        super().__init__()
        self.parallel = cfg.parallel_residual
        self.input_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.attention = Attention(cfg, layer)
        self.mlp = MLP(cfg)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend_BHTS: Tensor | None, cache: KVCache | None,
                last: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """-> the residual stream after the block, the MLP's output m_BTD, the MLP's neurons_BTM; `last`: only the last so many positions (0: all)."""
        h_BTD = x_BTD + self.attention(self.input_layernorm(x_BTD), rotary, attend_BHTS, cache)
        x_BTD, h_BTD = x_BTD[:, -last:], h_BTD[:, -last:]          # last = 0 keeps all, as −0 is 0
        mlp_BTD, neurons_BTM = self.mlp(self.post_attention_layernorm(x_BTD if self.parallel else h_BTD))
        return h_BTD + mlp_BTD, mlp_BTD, neurons_BTM


class Backbone(nn.Module):
    """All but the unembedding; a module of its own because checkpoints name it `gpt_neox`."""

    def __init__(self, cfg: PythiaConfig):
        super().__init__()
        self.embed_in = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)


class Pythia(nn.Module):
    """A GPT-NeoX language model whose MLP outputs can be read, and edited, at any layer.

    Everywhere: tokens_BT are ids, mask_BT is 1 for a real token and 0 for padding (left or right; None: all real), layers count
    from 0, and `edits` maps a layer to a function (mlp_BTD, neurons_BTM) -> change_BTD. The change is added to the residual
    stream after the block, (x + attn + mlp) + change, so a zero change leaves every bit alone.
    """

    def __init__(self, cfg: PythiaConfig):
        super().__init__()
        self.cfg = cfg
        self.recompute = False                       # activations in the backward pass, layer by layer, in place of keeping them
        self.gpt_neox = Backbone(cfg)
        self.embed_out = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight

    @property
    def device(self) -> torch.device:
        return self.gpt_neox.embed_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.gpt_neox.embed_in.weight.dtype

    # ---- the forward pass, whole and in parts

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, edits: Edits | None = None) -> Tensor:
        """-> logits_BTV, of the next token at each position."""
        return self.embed_out(self.hidden(tokens_BT, mask_BT, edits))

    def hidden(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, edits: Edits | None = None, last: int = 0) -> Tensor:
        """-> hidden_BTD, the final hidden state after the last layer norm; `embed_out` makes logits of it. `last`: only the last so many
        positions (0: all), for which alone the last MLP is computed."""
        x_BTD = self.gpt_neox.embed_in(tokens_BT)
        return self.gpt_neox.final_layer_norm(self._run(x_BTD, range(self.cfg.num_layers), mask_BT, edits, last=last)[0])

    def trunk(self, tokens_BT: Tensor, layer: int, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run layers 0..layer, unedited -> resid_BTD after `layer`, its mlp_BTD and neurons_BTM."""
        return self._run(self.gpt_neox.embed_in(tokens_BT), range(self.check_layer(layer) + 1), mask_BT, None)

    def mlp_output(self, tokens_BT: Tensor, layer: int, mask_BT: Tensor | None = None) -> Tensor:
        """-> mlp_BTD, the MLP's output at `layer` (with its bias, before it joins the residual stream)."""
        return self.trunk(tokens_BT, layer, mask_BT)[1]

    def forward_from(self, resid_BTD: Tensor, layer: int, mask_BT: Tensor | None = None, edits: Edits | None = None) -> Tensor:
        """Run the layers above `layer` on the residual stream after it -> logits_BTV."""
        return self.embed_out(self.hidden_from(resid_BTD, layer, mask_BT, edits))

    def hidden_from(self, resid_BTD: Tensor, layer: int, mask_BT: Tensor | None = None, edits: Edits | None = None, last: int = 0) -> Tensor:
        """Run the layers above `layer` on the residual stream after it -> hidden_BTD, as `hidden`."""
        above = range(self.check_layer(layer) + 1, self.cfg.num_layers)
        return self.gpt_neox.final_layer_norm(self._run(resid_BTD, above, mask_BT, edits, last=last)[0])

    def _run(self, x_BTD: Tensor, layers: range, mask_BT: Tensor | None, edits: Edits | None,
             cache: KVCache | None = None, last: int = 0, record: list | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run `layers` on the residual stream x_BTD -> the stream after them, and the last one's mlp_BTD and neurons_BTM. To a list `record`
        is appended the triple that `trunk` returns for the lowest edited layer, so that PPO need not run the layers up to it again."""
        T = x_BTD.shape[1]
        rotary = cache.rotary.at(cache.where) if cache else Rotary(self.cfg, T, x_BTD.device, x_BTD.dtype)
        attend_BHTS = attention_mask(mask_BT, cache.where if cache else slice(0, T), x_BTD.dtype)
        mlp_BTD = neurons_BTM = None
        for layer in layers:
            block = self.gpt_neox.layers[layer]
            if self.recompute and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)       # nothing is random here
            x_BTD, mlp_BTD, neurons_BTM = block(x_BTD, rotary, attend_BHTS, cache, last if layer == layers[-1] else 0)
            if edits and layer in edits:
                if record is not None and layer == min(edits):
                    record.append((x_BTD, mlp_BTD, neurons_BTM))
                x_BTD = x_BTD + edits[layer](mlp_BTD, neurons_BTM)
        return x_BTD[:, -last:], mlp_BTD, neurons_BTM              # cut here where there was no layer to run

    def check_layer(self, layer: int) -> int:
        """-> `layer`, or a UserError where the model has no such layer."""
        if not 0 <= layer < self.cfg.num_layers:
            raise UserError(f"layer {layer} does not exist: this model has layers 0 to {self.cfg.num_layers - 1} (--layer)")
        return layer

    # ---- generation

    @torch.no_grad()
    def generate(self, prompt_BT: Tensor, max_new_tokens: int, mask_BT: Tensor | None = None, temperature: float = 1.0,
                 edits: Edits | None = None, generator: torch.Generator | None = None, record: list | None = None) -> Tensor:
        """Sample `max_new_tokens` tokens after left-padded prompts -> tokens, prompt and continuation, (B, T + max_new_tokens).

        temperature 0 is greedy. All uniforms are drawn before the first token, (B, max_new_tokens), so that two models given
        equal generators use the same one for the same row and step. Nothing stops at an end-of-text token: cut there yourself.
        A list `record` gets the triples that `trunk` returns for the lowest edited layer: of the prompt, then of each new token but the last.
        """
        B, T = prompt_BT.shape
        if mask_BT is not None and not mask_BT[:, -1].all():
            raise ValueError("generate needs left-padded prompts: the last column of the mask must be all 1")
        if not max_new_tokens:
            return prompt_BT
        S = T + max_new_tokens
        room = -(-S // 8) * 8                        # of cache and mask: CUDA's attention kernels want masks of a multiple of 8
        uniform_BR = 1 - torch.rand(B, max_new_tokens, generator=generator, device=generator.device if generator else "cpu").to(self.device)
        uniform_BS, tokens_BS = F.pad(uniform_BR, (T, 0)), F.pad(prompt_BT, (0, max_new_tokens))         # both by position
        mask_BS = None if mask_BT is None or mask_BT.all() else F.pad(mask_BT, (0, room - T), value=1)
        cache = KVCache(self.cfg, B, room, self.device, self.dtype)

        def draw(new: Positions, after: Positions, mask_BS: Tensor | None = mask_BS) -> list:
            """Run the tokens at positions `new`; from the last of them, draw the one at position `after` -> what `record` gets."""
            cache.where, recorded = new, None if record is None else []
            x_BTD = self._run(self.gpt_neox.embed_in(tokens_BS[:, new]), range(self.cfg.num_layers), mask_BS, edits, cache, record=recorded)[0]
            logits_BTV = self.embed_out(self.gpt_neox.final_layer_norm(x_BTD[:, -1:]))
            tokens_BS[:, after] = sample(logits_BTV[:, 0], temperature, uniform_BS[:, after].squeeze(1))[:, None]
            return recorded or []

        recorded = draw(slice(0, T), slice(T, T + 1))
        if max_new_tokens > 2 and use_graphs(self.device):
            recorded += draw_by_graph(draw, T, S, torch.ones(1, room, device=self.device) if mask_BS is None else mask_BS)
        else:
            for step in range(T + 1, S):
                recorded += draw(slice(step - 1, step), slice(step, step + 1))
        if record is not None:
            record += recorded
        return tokens_BS

    # ---- making, loading and saving

    def initialize(self, generator: torch.Generator) -> "Pythia":
        """Fresh weights: N(0, 0.02²), the two projections into the residual stream smaller by √(2 · layers) (GPT-2), biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:                  # a bias, or the weight of a layer norm
                nn.init.constant_(parameter, name.endswith("weight"))
            else:
                into_residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
                std = 0.02 / math.sqrt(2 * self.cfg.num_layers) if into_residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
        return self

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, revision: str = "main", dtype: torch.dtype | None = None,
                        device: str | torch.device = "cpu") -> "Pythia":
        """Load a model by name or folder, frozen and in eval mode; dtype None keeps the file's own.

        UserError where it is not found, is not GPT-NeoX, or a tensor is missing, unknown or misshapen.
        """
        files = CheckpointFiles(name_or_folder, revision)
        path = files.need("config.json")
        config = cls.read_config(read_json(path), path)
        with torch.device("meta"):                   # no memory yet: the loaded tensors become the parameters
            model = cls(PythiaConfig.from_json(config, path)).requires_grad_(False).eval()
        load_strictly(model, cls.rename(read_weights(files), config), files, dtype, device)
        return model

    @staticmethod
    def read_config(config: dict, source: object) -> dict:
        """-> the config.json of a checkpoint as GPT-NeoX's."""
        return config

    @staticmethod
    def rename(tensors: Iterator[tuple[str, Tensor]], config: dict) -> Iterator[tuple[str, Tensor]]:
        """-> a checkpoint's tensors under this class's parameter names."""
        return tensors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers loads too."""
        weights = self.state_dict()
        if self.cfg.tie_embeddings:
            del weights["embed_out.weight"]
        write_safetensors(Path(folder) / "model.safetensors", weights)
        write_json(Path(folder) / "config.json", self.cfg.to_json(self.dtype))


def use_graphs(device: torch.device) -> bool:
    """-> whether sampling runs as a CUDA graph; PyTorch captures on the current device alone."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()


def capturing(x: Tensor) -> bool:
    """-> whether what is being done with x is captured as a CUDA graph."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draw_by_graph(draw: Callable, T: int, S: int, mask_BS: Tensor) -> list:
    """Draw tokens T + 1 to S − 1 on a GPU by `draw(new, after, mask_BS)` -> what each call gave, in one list.

    A token is hundreds of small kernels, which Python starts more slowly than a GPU runs them. A CUDA graph starts them all at once. It does
    again exactly what was done while it was captured, with the same tensors: hence positions in tensors, all of the cache, and masks. What
    it does must not depend on values that Python sees, as the shape of `nonzero` does.
    """
    at_1 = torch.tensor([T], device=mask_BS.device)

    def draw_next() -> list:
        recorded = draw(at_1, at_1 + 1, mask_BS)
        at_1.add_(1)
        return recorded

    recorded = draw_next()                               # as usual, for a kernel's first call sets up what cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):                    # written down, not done: at_1 and the tokens stay as they are
        kept = draw_next()
    for _ in range(T + 2, S):
        graph.replay()
        recorded += [tuple(x.clone() for x in triple) for triple in kept]            # each replay writes to the same ones
    return recorded


def attention_mask(mask_BT: Tensor | None, queries: Positions, dtype: torch.dtype) -> Tensor | None:
    """-> attend_BHTS (H = 1), to be added before the softmax: 0 where a query may look (at real tokens, not after itself), −∞ elsewhere.
    None: nothing is padded.

    `queries` are the positions of those that attend; the keys are all tokens of mask_BT, or those up to the last query where that is known.
    A query always sees itself, so that padding never makes a softmax over nothing (NaN).
    """
    if mask_BT is None:
        return None
    mask_BT = mask_BT[:, :queries.stop] if isinstance(queries, slice) else mask_BT
    key_S = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    query_T1 = key_S[queries][:, None]
    barred_BTS = ~(mask_BT.bool()[:, None] & (key_S <= query_T1)) & (key_S != query_T1)
    return torch.zeros_like(barred_BTS, dtype=dtype).masked_fill_(barred_BTS, -math.inf)[:, None]


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """-> logits (…, V) divided by the temperature, in float32 or better; at 1 without a needless pass over what is often the largest tensor."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1 else logits / temperature


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at uniform_B, in (0, 1]; temperature 0: the most likely.

    torch.multinomial draws a random number for every entry of the vocabulary, ten times the cost of a softmax and a cumsum.
    The last entry of a float32 cumsum is not quite 1, so the uniform is scaled by it; as it is never 0, an entry of
    probability 0 is never drawn. Where logits are NaN, some token is "drawn"; who uses them finds out (`run.check_finite`).
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    cumulative_BV = torch.softmax(tempered(logits_BV, temperature), dim=-1).cumsum(-1)
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:])
    return drawn_B1.squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)


# ---------------------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Byte-pair encoding as in a tokenizer.json of the `tokenizers` library (byte-level BPE, GPT-2's pre-tokenizer), by tiktoken.

    Added tokens that are not to be normalised (the special ones) are found in the raw text, then the text is NFC-normalised, then the other added
    tokens (runs of 2–24 spaces, the longest first) are cut out, and what lies between is encoded. Ids are in merge order, so they serve as
    tiktoken's ranks.
    """

    GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, config: dict, source: object = "tokenizer.json"):
        with reading(source, "not a byte-level BPE tokenizer.json"):
            model, pre_tokenizer, normalizer = config["model"], config["pre_tokenizer"] or {}, config["normalizer"] or {}
            if not (model["type"] == "BPE" and pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer.get("add_prefix_space")
                    and pre_tokenizer.get("use_regex", True) and normalizer.get("type", "NFC") == "NFC"):
                raise ValueError("only byte-level BPE with GPT-2's pattern, no prefix space, and NFC or no normalisation, is supported")
            merged = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
            if (ids := [model["vocab"][token] for token in merged]) != sorted(ids):
                raise ValueError("the merges are not in the order of their ids")
            added, byte_of = {token["content"]: token for token in config["added_tokens"]}, bytes_of_characters()
            if odd := {token for token in model["vocab"] if len(token) > 1 and token not in added} - set(merged):
                raise ValueError(f"no merge makes {len(odd)} of its tokens, as {min(odd)!r}")
            if any(token.get(flag) for token in added.values() for flag in ("lstrip", "rstrip", "single_word")):
                raise ValueError("added tokens with lstrip, rstrip or single_word are not supported")
            ranks = {bytes(byte_of[c] for c in token): rank for token, rank in model["vocab"].items() if token not in added}
            self.added_ids = {content: token["id"] for content, token in added.items()}
            all_ids = [*ranks.values(), *self.added_ids.values()]
            if not all(type(i) is int and 0 <= i < 2 ** 24 for i in all_ids) or len(set(all_ids)) < len(all_ids):
                raise ValueError("ids must be whole numbers below 2 ** 24, each given once")
            if not UTF8_BYTES <= ranks.keys() or "" in added or END_OF_TEXT not in added:
                raise ValueError(f"every byte of UTF-8 and {END_OF_TEXT} must be tokens, and no added token may be empty")
            normalized = [content for content, token in added.items() if token.get("normalized", not token["special"])]
            self.raw_pattern, self.normal_pattern = any_of(list(added.keys() - normalized)), any_of(normalized)
            self.encoding = tiktoken.Encoding(str(source), pat_str=self.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=self.added_ids)
        self.config, self.nfc, self.known_ids = config, bool(normalizer), set(all_ids)
        self.vocab_size = max(all_ids) + 1
        self.end_of_text = self.added_ids[END_OF_TEXT]

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, revision: str = "main") -> "Tokenizer":
        """Load tokenizer.json of a model (by name or folder), or that file itself."""
        path = Path(name_or_folder)
        path = path if os.path.isfile(path) else CheckpointFiles(name_or_folder, revision).need("tokenizer.json")
        return cls(read_json(path), path)

    def check_fits(self, model: Pythia, source: object) -> None:
        """UserError where the model has fewer embeddings than this has ids."""
        if self.vocab_size > model.cfg.vocab_size:
            raise UserError(f"{source}: the tokenizer has ids up to {self.vocab_size - 1}, the model only {model.cfg.vocab_size} embeddings")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json."""
        write_json(Path(folder) / "tokenizer.json", self.config)

    def encode(self, text: str) -> list[int]:
        """-> token ids; special tokens written out in the text are recognised."""
        ids: list[int] = []
        for raw, found_raw in split_at(self.raw_pattern, text):
            normal = unicodedata.normalize("NFC", raw) if self.nfc else raw
            for plain, found in split_at(self.normal_pattern, normal):
                if len(plain) > MAX_BLANK and re.search(rf"(?<!\s)\s{{{MAX_BLANK}}}", plain):
                    raise UserError(f"a text has {MAX_BLANK} white spaces in a row, too many for tiktoken: shorten them")
                ids += self.encoding.encode_ordinary(plain)
                if found:
                    ids.append(self.added_ids[found])
            if found_raw:
                ids.append(self.added_ids[found_raw])
        return ids

    def decode(self, ids: list[int] | Tensor) -> str:
        """-> text; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary (padding rows of the embedding) nothing."""
        return self.encoding.decode([i for i in map(int, ids) if i in self.known_ids])


MAX_BLANK = 500_000          # tiktoken panics at a million
UTF8_BYTES = {bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1)}     # all that occur in it


def bytes_of_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes in vocabularies: printable bytes as themselves, the rest as U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def any_of(contents: list[str]) -> re.Pattern:
    """A pattern that finds the leftmost and there the longest of `contents`; nothing where there are none."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(contents, key=len, reverse=True))) or '(?!)'})")


def split_at(pattern: re.Pattern, text: str) -> Iterator[tuple[str, str]]:
    """-> (text before a match, the match) pairs; the last match is empty."""
    parts = [*pattern.split(text), ""]
    return zip(parts[::2], parts[1::2])


def pad(rows: list[list[int]], pad_id: int = 0, side: str = "right", device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """-> tokens_BT, mask_BT (int64, 1: real) of rows of ids; generation needs the padding on the left."""
    tokens, ones = [torch.tensor(row) for row in rows], [torch.ones(len(row), dtype=torch.long) for row in rows]
    return tuple(pad_sequence(parts, True, filler, side).to(device) for parts, filler in ((tokens, pad_id), (ones, 0)))


# -------------------------------------------------------------------------------------------------------------- checkpoints

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")     # in old files; constants, made anew here
MAX_HEADER = 10_000_000                              # bytes, of 100,000 tensors; once parsed it takes up to 30 times the memory


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """-> name -> tensor, memory-mapped: nothing is read before it is used, and a write to a tensor stays in memory."""
    return dict(stream_safetensors(path))


def stream_safetensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """-> name and mapped tensor, one after another; the memory that reading one took is given back when the next is asked for, so that
    who copies them one by one never holds the file beside the copies.

    Format: 8 bytes of header length, little endian; a JSON header {name: {dtype, shape, data_offsets}}; the data.
    UserError where the file is truncated, or its header is not exactly that.
    """
    with reading(path, "not a whole safetensors file of known types, get it again"):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > min(size, MAX_HEADER):
                raise ValueError(f"the header does not end within the file ({size} bytes)")
            header = json.loads(file.read(start - 8).decode(), object_pairs_hook=each_once)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = memoryview(mapping)[start:]
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, stop), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            if len(shape) > 8 or any(type(n) is not int or not 0 <= n < 2 ** 48 for n in (*shape, begin, stop)) or max(begin, stop) > len(data):
                raise ValueError(f"tensor {name!r} of shape {shape} at {begin} to {stop} is not within {len(data)} bytes: truncated?")
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} of shape {shape} has bytes {begin} to {stop}, where {end} was next")
            flat = torch.frombuffer(data[begin:stop], dtype=dtype) if stop > begin else torch.empty(0, dtype=dtype)
            tensors[name], end = flat.view(shape), stop
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes of data belong to no tensor")
    for name, tensor in tensors.items():
        yield name, tensor
        mapping.madvise(mmap.MADV_DONTNEED)


def each_once(pairs: list[tuple]) -> dict:
    """A JSON object, in which no name may come twice (Python's parser would silently keep the last)."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice in the header")
    return dict(pairs)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (of any device, contiguous or not) in one file, whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)            # so that the data begin at a multiple of 8

    def write(file: BinaryIO) -> None:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    write_whole(path, write)


def read_weights(files: CheckpointFiles) -> Iterator[tuple[str, Tensor]]:
    """-> names and tensors of a checkpoint, from one mapped shard after the other: safetensors, or where there is none, PyTorch's .bin files, whose
    pickles may hold nothing but tensors. An index is trusted, a lone shard without one is not: repositories exist that hold a partial
    safetensors shard beside complete .bin files."""
    for whole in WEIGHTS:
        if index := files.find(whole + ".index.json"):
            with reading(index, "has no weight_map of plain file names"):
                shards = sorted(set(read_json(index)["weight_map"].values()))
                if any(not re.fullmatch(r"\w[\w.-]*", name) for name in shards):
                    raise ValueError(f"it names {shards}")
        elif files.find(whole):
            shards = [whole]
        else:
            continue
        for shard in shards:
            path = files.need(shard)
            if whole.endswith("safetensors"):
                yield from stream_safetensors(path)
                continue
            tensors = load_state(path)
            if not isinstance(tensors, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
                raise UserError(f"{path}: holds something else than tensors by name")
            yield from tensors.items()
        return
    raise UserError(f"{files}: has neither model.safetensors nor pytorch_model.bin, nor an index of their shards")


def load_strictly(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], source: object, dtype: torch.dtype | None,
                  device: str | torch.device) -> None:
    """Give a model made on the meta device its parameters, copied one by one; UserError names what is missing, unknown or misshapen."""
    wanted, state = model.state_dict(), {}
    for name, tensor in tensors:
        if name in wanted and tensor.shape != wanted[name].shape:
            raise UserError(f"{source}: {name!r} has shape {tuple(tensor.shape)}, the config wants {tuple(wanted[name].shape)}")
        if not name.endswith(BUFFERS):
            state[name] = nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True), requires_grad=False)
    if model.cfg.tie_embeddings and "embed_out.weight" in wanted:
        state["embed_out.weight"] = state.get("gpt_neox.embed_in.weight")
    problems = [f"{problem} {len(names)} tensor(s): {', '.join(map(repr, names[:5]))}{', …' if names[5:] else ''}"
                for problem, names in (("lacks", sorted(wanted.keys() - state)), ("has unknown", sorted(state.keys() - wanted))) if names]
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
    model.load_state_dict(state, assign=True)        # the parameters themselves: a tied one stays one
