"""Mutated files for every reader of files that come from strangers: each ends well or in a UserError of one line, nothing else.

    python tests/fuzz_test.py [--inputs 120000] [--seed 0]         prints counts for each reader; five minutes or so

What must hold, for each input: no exception but UserError, and that one line; no tensor that reaches beyond its file's mapping or differs
from the bytes that its header names; no more memory than HEADROOM above what was there before (inputs are of some kilobytes).
"""

import argparse
import collections
import gzip
import json
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from files import CheckpointFiles, UserError, read_json, read_rows  # noqa: E402
from lm import read_texts  # noqa: E402
from pythia import Pythia, PythiaConfig, Tokenizer, bytes_of_characters, read_safetensors, read_weights, write_safetensors  # noqa: E402
from reward import load_preferences  # noqa: E402

HEADROOM = 64 * 2 ** 20                              # bytes of address space
HOSTILE = [None, True, False, 0, -1, 1, 2, 3, 4, 8, 0.0, 1.5, -0.5, 2 ** 31, 2 ** 32 - 1, 2 ** 63, 2 ** 64, 10 ** 400, -10 ** 30,
           float("nan"), float("inf"), 1e308, "", "\0", "..", "../x", "/etc/passwd", "a/b", "\ud800", "é" * 9, "F32", "I64", "BOOL", "BPE",
           [], [0], [[]], {}, {"": 0}, {"type": "ByteLevel"}, [2 ** 62, 4], [0, 2 ** 63], [1] * 100, "x" * 1000, "<|endoftext|>", "gelu"]


def mutate_json(value, rng: random.Random):
    """-> a copy with one place changed: replaced by something hostile, removed, doubled, or moved."""
    places = []                                      # (container, key) of all values inside

    def walk(node):
        for key in (list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            places.append((node, key))
            walk(node[key])

    value = json.loads(json.dumps(value))
    walk(value)
    if not places or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places[:200] if rng.random() < 0.5 else places)
    kind = rng.randrange(6)
    if kind < 3:
        node[key] = rng.choice(HOSTILE)
    elif kind == 3:
        del node[key]
    elif kind == 4 and type(node[key]) in (int, float):
        node[key] += rng.choice([-1, 1, 8, -8, 2 ** 40])
    elif isinstance(node, dict):
        node[str(rng.choice(HOSTILE))] = node[key]
    else:
        node.append(node[key])
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """-> a copy with some bytes flipped, cut out, doubled, overwritten, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        i, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i:i + n]
        elif kind == 2:
            data[i:i] = data[i:i + n]
        elif kind == 3:
            data[i:i + n] = bytes(rng.choice((0, 0xFF, rng.randrange(256))) for _ in range(n))
        elif kind == 4:
            data[i:i] = rng.choice((b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xff", b"\n", b"\0", b'"', b"NaN", b"-1", b",", b"1e999"))
        elif kind == 5 and rng.random() < 0.3:
            del data[i:]
    return bytes(data)


def mutated(value, rng: random.Random) -> bytes:
    """-> JSON, with its value changed at up to three places, or the bytes of its text, or both."""
    way = rng.random()
    for _ in range(rng.choice((1, 1, 2, 3)) if way < 0.7 else 0):
        value = mutate_json(value, rng)
    encoded = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(encoded, rng) if way > 0.6 else encoded


# ------------------------------------------------------------------------------------------------- one function a reader

def fuzz_safetensors(path: Path, rng: random.Random):
    """A file of four small tensors; what is accepted must lie in the mapping, and be the bytes that the header names."""
    seed = path.with_name("seed")
    if not seed.exists():
        write_safetensors(seed, {"a": torch.arange(6.).view(2, 3), "b": torch.ones(5, dtype=torch.int16), "c": torch.empty(0, 4),
                                 "d": torch.arange(3, dtype=torch.int64)})
    whole = seed.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8:8 + length], whole[8 + length:]
    if rng.random() < 0.3:
        path.write_bytes(mutate_bytes(whole, rng))
    else:
        header = mutated(json.loads(header), rng)
        if rng.random() < 0.1:                       # a name that comes twice
            header = header[:-1].rstrip() + b',"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
        length = rng.choice((0, 1, -1, 8, 2 ** 31, 2 ** 63)) if rng.random() < 0.05 else 0
        path.write_bytes(struct.pack("<Q", max(0, len(header) + length)) + header + data)
    tensors = read_safetensors(path)
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(end, 16) for end in span.split("-")) for span in maps]
    named, held = json.loads(content[8:begin]), 0
    for name, tensor in tensors.items():
        first, size = tensor.data_ptr(), tensor.numel() * tensor.dtype.itemsize
        start, stop = named[name]["data_offsets"]
        assert list(tensor.shape) == named[name]["shape"] and stop - start == size and tensor.is_contiguous()
        if size:
            assert any(low <= first and first + size <= min(high, low + len(content)) for low, high in spans), "beyond the mapping"
            assert bytes(tensor.flatten().view(torch.uint8).tolist()) == content[begin + start:begin + stop], "other bytes"
        held += size
    assert begin + held == len(content), "overlaps or holes"


CONFIG = PythiaConfig(50, 24, 2, 3, 40, rotary_pct=0.5).to_json(torch.float32)


def fuzz_config(path: Path, rng: random.Random):
    path.write_bytes(mutated(CONFIG, rng))
    config = PythiaConfig.from_json(read_json(path), path)
    if rng.random() < 0.02 and config.num_layers < 50:                          # slow: as from_pretrained makes it
        with torch.device("meta"):
            Pythia(config)


def tokenizer_config() -> dict:
    vocab = bytes_of_characters()
    vocab |= {pair: 256 + i for i, pair in enumerate(("th", "he", "Ġt", "the", "in"))}
    added = [{"id": 300 + i, "content": content, "special": special}
             for i, (content, special) in enumerate((("<|endoftext|>", True), ("  ", False), ("   ", False), ("<|padding|>", True)))]
    merges = ["t h", "h e", "Ġ t", "th e", "i n"]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "normalizer": {"type": "NFC"}, "added_tokens": added,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}


TOKENIZER = tokenizer_config()


def fuzz_tokenizer(path: Path, rng: random.Random):
    path.write_bytes(mutated(TOKENIZER, rng))
    tokenizer = Tokenizer.from_pretrained(path)
    ids = tokenizer.encode("the inn   é<|endoftext|>\0\ud800😀 \x7f")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode([*ids, -1, 10 ** 9])


INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


def fuzz_index(path: Path, rng: random.Random):
    """Beside the folder lies a file that is none of its own: its tensor must never be read."""
    folder = path.parent / "checkpoint"
    folder.mkdir(exist_ok=True)
    if not (folder / "model-2.safetensors").exists():
        for i, name in enumerate("ab", start=1):
            write_safetensors(folder / f"model-{i}.safetensors", {name: torch.ones(1)})
        write_safetensors(path.parent / "secret", {"secret": torch.ones(1)})
    value = json.loads(json.dumps(INDEX))
    if rng.random() < 0.3:
        value["weight_map"][rng.choice("abc")] = rng.choice([
            "../secret", "..", ".", "", str(path.parent / "secret"), "./../secret", "a/../../secret", "..\\secret", "../secret\0",
            "model-1.safetensors\0", "model-1.safetensors/../../secret"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    else:
        (folder / "model.safetensors.index.json").write_bytes(mutated(value, rng))
    for name, _ in read_weights(CheckpointFiles(folder)):
        assert name != "secret"


ROWS = [{"text": "a film ☃", "label": 1}, {"text": "b", "label": 0},
        {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"}, {"prompt": "p", "chosen": "c", "rejected": "r"}]


def fuzz_rows(path: Path, rng: random.Random):
    rows = rng.choices(ROWS[:2] if rng.random() < 0.5 else ROWS[2:], k=4)
    data = b"\n".join(mutated(row, rng) if rng.random() < 0.3 else json.dumps(row).encode() for row in rows)
    if rng.random() < 0.3:
        path = path.with_suffix(".jsonl.gz")
        data = gzip.compress(data, 1)
        data = mutate_bytes(data, rng) if rng.random() < 0.8 else data
    path.write_bytes(data)
    rng.choice((read_rows, read_texts, load_preferences))(path)


READERS = {"safetensors": fuzz_safetensors, "config": fuzz_config, "tokenizer": fuzz_tokenizer, "index": fuzz_index, "jsonl": fuzz_rows}
SHARES = {"safetensors": 0.4, "config": 0.2, "tokenizer": 0.1, "index": 0.1, "jsonl": 0.2}


def fuzz(reader: str, inputs: int, seed: int, folder: Path) -> str:
    """-> a line of counts; an exception that is no UserError goes through, with the seed of its input in a note."""
    counts, begun = collections.Counter(), time.monotonic()
    for i in range(inputs):
        try:
            READERS[reader](folder / "file.jsonl", random.Random(f"{reader} {seed} {i}"))
            counts["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 20_000, f"{reader} {seed} {i}: {error}"
            counts["refused"] += 1
        except BaseException as error:
            error.add_note(f"input: {reader} {seed} {i}")
            raise
    assert counts["read"] or inputs < 50, f"{reader}: all were refused, so that nothing was tried but the first check"
    return (f"{reader}: {inputs} inputs, {counts['refused']} refused in one line, {counts['read']} read, 0 crashes, "
            f"0 reads outside the file ({time.monotonic() - begun:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for reader in READERS:                       # once without a limit, so that what is loaded late is there
            fuzz(reader, 20, -1, Path(folder))
        with torch.device("meta"):
            Pythia(PythiaConfig.from_json(CONFIG))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
        for reader, share in SHARES.items():
            print(fuzz(reader, round(share * args.inputs), args.seed, Path(folder)), flush=True)


def test_a_sample(tmp_path):
    for reader, share in SHARES.items():
        fuzz(reader, round(share * 500), 1, tmp_path)


if __name__ == "__main__":
    main()
