"""Downloads against two local servers in the layout of the Hugging Face hub: one that answers, one that large files are redirected to."""

import errno
import hashlib
import http.client
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from conftest import complaint, random_model, random_tokens
from files import CheckpointFiles, hub_file, write_json
from pythia import Pythia, Tokenizer, read_safetensors, write_safetensors

COMMIT, REPO, LARGE = "0123456789abcdef" * 2 + "01234567", "acme/neo", 4096
BYTES = bytes(range(256)) * 1024                                 # content of a large file
GOLDEN = Path(__file__).parent / "golden"


class Server(ThreadingHTTPServer):
    """Serves `hub.files`; the hub itself (`storage` None), or the storage behind it, which knows nothing but hashes."""

    def __init__(self, hub: "Hub", storage: "Server | None"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.storage = hub, storage
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, at_hub = self.server.hub, self.server.storage is not None
        self.path = self.path.removeprefix("http://hub.test")    # as a proxy is asked
        hub.seen.append((self.command, "hub" if at_hub else "storage", self.path, self.headers["Range"], self.headers["Authorization"]))
        if not at_hub:
            return self.content(next(data for data in hub.files.values() if hub.etag(data) == self.path[1:]), {})
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        start, _, name = self.path.removeprefix("/moved").rpartition("/")
        if start not in (f"/{REPO}/resolve/main", f"/{REPO}/resolve/{COMMIT}", f"/{REPO}/resolve/refs%2Fpr%2F1"):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if name not in hub.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data, commit = hub.files[name], hub.main if "/resolve/main" in self.path else COMMIT
        headers = {"X-Repo-Commit": commit, "ETag": f'W/"{hub.etag(data)}"'}
        if len(data) >= LARGE:
            linked = {"X-Linked-Etag": f'"{hub.etag(data)}"', "X-Linked-Size": str(len(data)), "ETag": '"of the redirect"'}
            return self.answer(302, headers | linked | {"Location": f"http://localhost:{self.server.storage.server_port}/{hub.etag(data)}"})
        if not self.path.startswith("/moved"):                   # small files move within the host
            return self.answer(307, {"Location": f"/moved{self.path}"})
        return self.content(data, headers)

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def content(self, data: bytes, headers: dict) -> None:
        """The data, as the hub of this test spoils or breaks it off."""
        hub = self.server.hub
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-")) if hub.ranges else 0
        whole = bytes(len(data)) if hub.spoiled else data
        self.answer(206 if start else 200, headers | {"Content-Length": str(len(data) - start)},
                    whole[start:start + hub.cuts.pop(0)] if hub.cuts and self.command == "GET" else whole[start:])

    def log_message(self, *arguments):
        pass


class Hub:
    def __init__(self):
        self.files, self.seen, self.cuts = {}, [], []            # cuts: how many bytes of each coming answer arrive
        self.token, self.ranges, self.spoiled, self.main = None, True, False, COMMIT
        self.storage = Server(self, None)
        self.server = Server(self, self.storage)

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def add(self, folder: Path) -> None:
        self.files |= {path.name: path.read_bytes() for path in folder.iterdir()}

    def take(self) -> list[tuple]:
        """-> the requests since the last call: (method, server, path, range, authorization)."""
        seen, self.seen[:] = self.seen[:], []
        return seen


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield hub
    for server in (hub.server, hub.storage):
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(hub, tmp_path) -> Path:
    return tmp_path / "home" / "hub" / "models--acme--neo"


def tree(folder: Path) -> set[str]:
    """-> all files and links below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# -------------------------------------------------------------------------------------------------------------- the cache

@pytest.mark.parametrize("data", [BYTES, b"{}", b""], ids=["large", "small", "empty"])
def test_cache_has_the_layout_of_huggingface_hub_and_is_asked_first(hub, cache, data):
    hub.files["f"] = data
    path = hub_file(REPO, "main", "f")
    assert path == cache / "snapshots" / COMMIT / "f" and path.read_bytes() == data
    assert tree(cache) == {"refs/main", f"snapshots/{COMMIT}/f", f"blobs/{hub.etag(data)}"}
    assert os.readlink(path) == f"../../blobs/{hub.etag(data)}" and (cache / "refs" / "main").read_text() == COMMIT
    assert hub.take()
    assert hub_file(REPO, "main", "f") == hub_file(REPO, COMMIT, "f") == path and not hub.take()
    assert hub_file(REPO, "refs/pr/1", "f") == path and {method for method, *_ in hub.take()} == {"HEAD"}      # the blob is there
    assert (cache / "refs" / "refs" / "pr" / "1").read_text() == COMMIT


def test_all_files_are_of_the_commit_that_the_first_was_of(hub, cache):
    hub.files = {"a": b"1", "b": b"2"}
    hub_file(REPO, "main", "a")
    hub.main = "f" * 40                                          # somebody pushes
    assert hub_file(REPO, "main", "b") == cache / "snapshots" / COMMIT / "b" and (cache / "refs" / "main").read_text() == COMMIT


def test_two_that_fetch_the_same_file_do_not_collide(hub):
    hub.files["f"] = BYTES
    with ThreadPoolExecutor(8) as pool:
        assert {path.read_bytes() for path in pool.map(lambda _: hub_file(REPO, "main", "f"), range(8))} == {BYTES}
    assert len([seen for seen in hub.take() if seen[1] == "storage"]) == 1


def test_a_snapshot_whose_blob_is_gone_is_fetched_again(hub):
    hub.files["f"] = BYTES
    path = hub_file(REPO, "main", "f")
    path.resolve().unlink()
    assert hub_file(REPO, "main", "f") == path and path.read_bytes() == BYTES


def test_what_is_absent_is_none_and_unknown_repositories_are_refused(hub, cache):
    assert hub_file(REPO, "main", "f") is None and not [name for name in tree(cache) if not name.startswith((".no_exist", "refs"))]
    assert "has no f" in complaint(CheckpointFiles(REPO).need, "f")
    for repo, revision in ("acme/other", "main"), (REPO, "v9"):
        assert f"f of {repo} ({revision}): there is no such repository or revision at http://127.0.0.1" in complaint(hub_file, repo, revision, "f")


# -------------------------------------------------------------------------------------------------------------- downloads

@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_cut_connections_are_taken_up_again(hub, ranges):
    hub.files["f"], hub.cuts, hub.ranges = BYTES, [1000, 70_000], ranges
    assert hub_file(REPO, "main", "f").read_bytes() == BYTES
    starts = [start for method, at, _, start, _ in hub.take() if at == "storage"]
    assert starts == [None, "bytes=1000-", f"bytes={71_000 if ranges else 70_000}-"]


def test_a_broken_off_download_goes_on_in_the_next_call(hub, cache):
    hub.files["f"], hub.cuts = BYTES, [1000] + 9 * [0]
    assert f"at 1000 of {len(BYTES)} bytes" in complaint(hub_file, REPO, "main", "f")
    assert tree(cache) == {f"blobs/{hub.etag(BYTES)}.incomplete"}
    hub.cuts = []
    hub.take()
    assert hub_file(REPO, "main", "f").read_bytes() == BYTES and hub.take()[-1][3] == "bytes=1000-"
    assert not [name for name in tree(cache) if name.endswith("incomplete")]


def test_a_full_disk_is_told_and_the_download_goes_on_where_it_was(hub, cache):
    hub.files["f"] = BYTES
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))              # Python ignores the signal: a write is then an error
    try:
        told = complaint(hub_file, REPO, "main", "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "incomplete: cannot be written" in told
    assert hub_file(REPO, "main", "f").read_bytes() == BYTES and hub.take()[-1][3] == "bytes=100000-"


@pytest.mark.parametrize("data", [BYTES, b"{}"], ids=["sha256", "git's sha1"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(hub, cache, data):
    hub.files["f"], hub.spoiled = data, True
    assert "announced size and hash" in complaint(hub_file, REPO, "main", "f") and tree(cache) == set()
    hub.spoiled = False
    assert hub_file(REPO, "main", "f").read_bytes() == data


def test_the_token_goes_to_the_first_host_only(hub, cache, monkeypatch):
    hub.files, hub.token = {"large": BYTES, "small": b"{}"}, "hf_secret"
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        message = complaint(hub_file, REPO, "main", "large")
        assert "401" in message and "HF_TOKEN" in message and "hf_wrong" not in message and tree(cache) == set()
    monkeypatch.setenv("HF_TOKEN", " hf_sec\nret\n")            # pasted in two lines
    hub.cuts = [100]                                             # a Range request is redirected, too
    hub.take()
    assert hub_file(REPO, "main", "large").read_bytes() == BYTES and hub_file(REPO, "main", "small").read_bytes() == b"{}"
    tokens = {at: {token for _, where, _, _, token in hub.seen if where == at} for at in ("hub", "storage")}
    assert tokens == {"hub": {"Bearer hf_secret"}, "storage": {None}} and "bytes=100-" in [start for _, _, _, start, _ in hub.take()]


def test_behind_a_proxy_redirects_and_the_token_stay_with_the_hub(hub, monkeypatch):
    hub.files, hub.token = {"f": b"{}"}, "secret"
    monkeypatch.setenv("http_proxy", os.environ["HF_ENDPOINT"])
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub_file(REPO, "main", "f").read_bytes() == b"{}"
    assert {(path.startswith("/moved"), token) for *_, path, _, token in hub.take()} == {(False, "Bearer secret"), (True, "Bearer secret")}


def test_a_hub_that_is_none_or_cannot_be_reached_is_one_line(hub, monkeypatch):
    hub.files["f"], endpoint = b"{}", os.environ["HF_ENDPOINT"]
    hub.main = "v1.0"                                            # what the server announces
    assert "no commit, etag and size" in complaint(hub_file, REPO, "main", "f")
    hub.server.shutdown()
    hub.server.server_close()
    for url in (endpoint, endpoint.removeprefix("http://"), "http://127.0.0.1:none", "localhost"):
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert complaint(hub_file, "acme/not-here", "main", "f").startswith("f of acme/not-here (main)")


def test_an_endpoint_may_end_with_a_slash(hub, monkeypatch):
    hub.files["f"] = b"{}"
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"] + "/")
    assert hub_file(REPO, "main", "f").read_bytes() == b"{}"


def test_repository_names_are_plain(hub):
    assert "not found" in complaint(CheckpointFiles, "acmé/neo") and not hub.take()


# ------------------------------------------------------------------------------------------------------ whole checkpoints

@pytest.mark.parametrize("form", ["lone", "sharded", "bin", "bin sharded"])
def test_models_load_from_the_hub_once_and_then_offline(hub, tmp_path, monkeypatch, form):
    model, tokens_BT = random_model(), random_tokens(2, 6)
    model.save_pretrained(tmp_path / "model")
    hub.add(tmp_path / "model")
    weights, names = read_safetensors(tmp_path / "model" / "model.safetensors"), list(model.state_dict())
    halves = [{name: weights[name] for name in names[i::2]} for i in range(2)]
    if form != "lone":
        kind = "model-{}.safetensors" if form == "sharded" else "pytorch_model-{}.bin" if form == "bin sharded" else "pytorch_model.bin"
        write = write_safetensors if form == "sharded" else lambda path, weights: torch.save(weights, path)
        parts = {kind.format(i): half for i, half in enumerate(halves)} if "sharded" in form else {kind: weights}
        for name, part in parts.items():
            write(tmp_path / name, part)
            hub.files[name] = (tmp_path / name).read_bytes()
        del hub.files["model.safetensors"]
        if "sharded" in form:
            write_json(tmp_path / "index", {"weight_map": {name: file for file, part in parts.items() for name in part}})
            hub.files[kind.replace("-{}", "") + ".index.json"] = (tmp_path / "index").read_bytes()
    assert torch.equal(Pythia.from_pretrained(REPO)(tokens_BT), model(tokens_BT)) and hub.take()
    for offline in ("0", "1"):                                   # all is known by now, also what the repository lacks
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        for revision in ("main", COMMIT):
            assert torch.equal(Pythia.from_pretrained(REPO, revision=revision)(tokens_BT), model(tokens_BT)) and not hub.take()


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("why", ["offline", "unreachable"])
def test_what_another_program_fetched_is_whole_without_a_network(hub, cache, monkeypatch, why, form):
    """huggingface_hub marks an absent file only if it was asked for it: after transformers, nothing says that there is no index."""
    model, tokens_BT, snapshot = random_model(), random_tokens(2, 6), cache / "snapshots" / COMMIT
    model.save_pretrained(snapshot)
    if form.endswith("bin"):
        torch.save(read_safetensors(snapshot / "model.safetensors"), snapshot / form)
        (snapshot / "model.safetensors").unlink()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv(*(("HF_HUB_OFFLINE", "1") if why == "offline" else ("HF_ENDPOINT", "http://127.0.0.1:9")))
    assert torch.equal(Pythia.from_pretrained(REPO)(tokens_BT), model(tokens_BT)) and not hub.take()
    (snapshot / form).unlink()                       # fetched in part: what is missing is not absent, it could not be asked for
    told = complaint(Pythia.from_pretrained, REPO)
    assert "model.safetensors.index.json of acme/neo (main)" in told and ("HF_HUB_OFFLINE is set" if why == "offline" else "cannot be reached") in told


def test_other_weights_are_not_taken_where_the_hub_fails_to_answer(hub, cache, tmp_path, monkeypatch):
    random_model().save_pretrained(tmp_path / "model")
    hub.add(tmp_path / "model")
    hub.files["pytorch_model.bin"] = b"others"
    hub_file(REPO, "main", "config.json")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "model.safetensors.index.json of acme/neo (main): not in the local cache" in complaint(Pythia.from_pretrained, REPO)


def test_the_cache_is_where_huggingface_hub_has_it(hub, tmp_path, monkeypatch):
    hub.files["f"] = b"{}"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    for variable, value, place in (("HF_HUB_CACHE", "$SCRATCH/x", "scratch/x"), ("HF_HOME", "~/hf", "me/hf/hub"),
                                   ("XDG_CACHE_HOME", str(tmp_path / "xdg"), "xdg/huggingface/hub"), ("HF_HOME", "", "me/.cache/huggingface/hub")):
        for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, value)
        assert hub_file(REPO, "main", "f") == tmp_path / place / "models--acme--neo" / "snapshots" / COMMIT / "f"


def test_an_empty_ref_is_as_none(hub, cache):
    hub.files["f"] = b"{}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").touch()
    assert hub_file(REPO, "main", "f") and (cache / "refs" / "main").read_text() == COMMIT


def test_a_network_that_fails_while_reading_is_no_full_disk(hub, monkeypatch):
    hub.files["f"], read, left = BYTES, http.client.HTTPResponse.read, [1]

    def failing(response, *size):
        if size and left:
            left.pop()
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        return read(response, *size)
    monkeypatch.setattr(http.client.HTTPResponse, "read", failing)
    assert hub_file(REPO, "main", "f").read_bytes() == BYTES and not left          # it was taken up again


def test_offline_names_file_and_place(hub, cache, monkeypatch):
    hub.add(GOLDEN / "parallel")
    for value in ("1", "true", "YES", "on"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        for load, name in (Pythia.from_pretrained, "config.json"), (Tokenizer.from_pretrained, "tokenizer.json"):
            message = complaint(load, REPO)
            assert message.startswith(f"{name} of {REPO} (main)") and str(cache) in message and "HF_HUB_OFFLINE" in message
    assert not hub.take() and not cache.exists()


def test_an_index_is_trusted_before_a_lone_file(tmp_path):
    """A folder may hold a partial model.safetensors beside the complete shards."""
    model, tokens_BT = random_model(), random_tokens(2, 6)
    model.save_pretrained(tmp_path)
    weights = read_safetensors(tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "all", weights)
    write_safetensors(tmp_path / "model.safetensors", {name: value for name, value in weights.items() if name != "embed_out.weight"})
    assert "embed_out.weight" in complaint(Pythia.from_pretrained, tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, "all")})
    assert torch.equal(Pythia.from_pretrained(tmp_path)(tokens_BT), model(tokens_BT))


def test_a_shard_without_an_index_is_not_trusted_beside_a_whole_bin(tmp_path):
    model, tokens_BT = random_model(), random_tokens(2, 6)
    model.save_pretrained(tmp_path)
    torch.save(read_safetensors(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    assert torch.equal(Pythia.from_pretrained(tmp_path)(tokens_BT), model(tokens_BT))
    torch.save([Path("x")], tmp_path / "pytorch_model.bin")      # a pickle of more than tensors
    assert "pytorch_model.bin: not readable as tensors" in complaint(Pythia.from_pretrained, tmp_path)
