"""Files: errors that tell the user what to do, files written whole or not at all, checkpoints of the Hugging Face hub.

The lowest room of the house: it knows no architecture. Whoever reads for the method can pass it by.
"""

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

WEIGHTS = ("model.safetensors", "pytorch_model.bin")                             # of a checkpoint: one file, or an index NAME.index.json of several


class UserError(Exception):
    """Something that the user can mend: what was wrong, in which file or option, what to do. Shown as one line, exit code 2."""


@contextlib.contextmanager
def reading(source: object, complaint: str) -> Iterator[None]:
    """Errors of reading and parsing inside the block become one UserError, "source: complaint: reason"."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (OSError, EOFError, zlib.error, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
        raise UserError(f"{source}: {complaint}: {reason[:300]}") from None


# ----------------------------------------------------------------------------------------------- reading and writing files

def write_whole(path: str | Path, write: Callable) -> None:
    """Call `write(binary file)` on a temporary file beside `path` and rename it, so that `path` is never half written; makes its folder."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        cause = error.__context__ if isinstance(error, RuntimeError) else error          # torch.save wraps it
        if isinstance(cause, OSError):
            raise not_written(path, cause) from None
        raise


def not_written(path: Path, error: OSError) -> UserError:
    """-> what to tell where a disk is full, or the like."""
    return UserError(f"{path}: cannot be written ({error.strerror}); what was saved before is whole: mend that, then --resume")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()))


def load_state(path: str | Path) -> dict:
    """Read what torch.save wrote; never runs code from the file."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))        # the older format cannot be mapped
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:                       # torch raises many kinds, which mean the same here but where memory is short
        raise UserError(f"{path}: not readable as tensors and numbers ({repr(error)[:200]}); if it is broken, get it again") from None


def read_json(path: str | Path) -> object:
    """Read a JSON file; UserError where it is missing or malformed."""
    with reading(path, "not readable as JSON"):
        return json.loads(Path(path).read_bytes())


def read_rows(path: str | Path) -> list[dict]:
    """Read a .jsonl or .jsonl.gz file of objects; UserError with the line's number where one is malformed."""
    rows = []
    with reading(path, "not readable as JSON lines"), (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                with reading(f"{path}: line {number}", "not readable as a JSON object"):
                    rows.append({} | json.loads(line.decode()))          # a TypeError where it is no object
    return rows


def finite(value: float) -> float | None:
    """-> the value as JSON can hold it: None for NaN and infinities."""
    return value if math.isfinite(value) else None


def located(path: str) -> str:
    """-> the path or, where there is none and it names a file beside this one (the prompts in assets/), that file's."""
    beside = Path(__file__).parent / path
    return str(beside) if not os.path.exists(path) and beside.is_file() else path


def sha256(path: str | Path) -> str:
    """-> the file's hash in hexadecimal digits, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------- the hub

class CheckpointFiles:
    """The files of a checkpoint: in a folder, of an embedded model, or of a Hugging Face repository, fetched when asked for.

    `tiny` is embedded; `pythia-70m` means EleutherAI/pythia-70m; `owner/name` is any repository, `revision` its branch, tag or commit.
    """

    def __init__(self, name_or_folder: str | Path, revision: str = "main"):
        self.name, self.revision = str(name_or_folder), revision
        assets = Path(__file__).parent / "assets"
        folders = [path for path in (Path(self.name), assets / self.name) if os.path.isdir(path)]
        self.folder = next((path for path in folders if os.path.isfile(path / "config.json")), folders[0] if folders else None)
        self.repo = f"EleutherAI/{self.name}" if self.name.startswith("pythia-") else self.name
        if self.folder is None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repo, re.ASCII):
            names = ", ".join(sorted(path.parent.name for path in assets.glob("*/config.json")))
            raise UserError(f"model {self.name!r} not found: it is no folder, no embedded model ({names}), no pythia-SIZE and no OWNER/NAME")

    def __str__(self) -> str:
        return str(self.folder or f"{self.repo} ({self.revision})")

    def find(self, name: str) -> Path | None:
        """-> the path of a file, or None where the checkpoint has no such file."""
        if self.folder is None:
            return hub_file(self.repo, self.revision, name)
        return path if os.path.isfile(path := self.folder / name) else None

    def need(self, name: str) -> Path:
        """-> the path of a file that must be there."""
        if path := self.find(name):
            return path
        raise UserError(f"{self}: has no {name}")


def hub_file(repo: str, revision: str, name: str) -> Path | None:
    """-> a file of a Hugging Face repository in the local cache, downloaded where it is not there; None: the repository lacks it.

    The cache has the layout of huggingface_hub (refs/REVISION names a commit, snapshots/COMMIT/FILE links to blobs/ETAG), so that either
    finds what the other fetched. HF_HOME, HF_HUB_CACHE, XDG_CACHE_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.path.expandvars(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))
    root = Path(cache) / f"models--{repo.replace('/', '--')}"
    ref = root / "refs" / revision
    commit = (ref.is_file() and ref.read_text().strip()) or revision
    if (path := root / "snapshots" / commit / name).is_file():
        return path
    # Who fetched the weights in one form need not have marked that the repository lacks the others.
    forms = {path.with_name(whole + end) for whole in WEIGHTS for end in ("", ".index.json")}
    if (root / ".no_exist" / commit / name).is_file() or path in forms and any(p.is_file() for p in forms - {path.with_name(f"{name}.index.json")}):
        return None
    what, endpoint = f"{name} of {repo} ({revision})", os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{what} is not at {path} and HF_HUB_OFFLINE is set: unset it, or fetch the file on a machine with a network "
                        f"and copy {root}")
    locks = root.parent / ".locks" / root.name
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)             # other processes wait, and then find the file fetched
        return fetch_file(f"{endpoint}/{repo}/resolve/{urllib.parse.quote(commit, safe='')}/{name}", what, root, ref, name)


def fetch_file(url: str, what: str, root: Path, ref: Path, name: str) -> Path | None:
    """-> a file of a repository, downloaded into its cache folder `root`; None: the repository lacks it. `ref` will name its commit."""
    with hub_request(url, what, "HEAD") as response:
        headers, absent = response.headers, response.status == 404
    if absent and headers.get("X-Error-Code") != "EntryNotFound":
        raise UserError(f"{what}: there is no such repository or revision at {url}, or it needs a token (HF_TOKEN)")
    commit = headers.get("X-Repo-Commit", "")
    known = re.fullmatch("[0-9a-f]{40}", commit)
    if absent:
        path = None
        if known:                                    # huggingface_hub marks an absent file so: no later call need ask again
            write_whole(root / ".no_exist" / commit / name, lambda file: None)
    else:
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
        if not (known and re.fullmatch(r"[\w-]{8,128}", etag) and size.isdecimal()):
            raise UserError(f"{url}: the server announces no commit, etag and size; is HF_ENDPOINT a Hugging Face hub?")
        blob, path = root / "blobs" / etag, root / "snapshots" / commit / name
        if not blob.is_file():
            download(url, what, blob, int(size), etag)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)             # a link whose blob is gone
            path.symlink_to(os.path.relpath(blob, path.parent))
    if known and commit != ref.name:
        write_whole(ref, lambda file: file.write(commit.encode()))
    return path


class SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects; the token goes with them only to the host it was meant for. A HEAD request stays on its host: the answer that
    points elsewhere is the one whose headers tell commit, size and hash."""

    def redirect_request(self, request: urllib.request.Request, *answer: object) -> urllib.request.Request | None:
        new = super().redirect_request(request, *answer)         # has the request's headers, but not the unredirected ones
        new_host, host = (urllib.parse.urlsplit(each.full_url)[:2] for each in (new, request))   # not request.host, which may be a proxy's
        if new_host == host:
            new.unredirected_hdrs = request.unredirected_hdrs
        elif request.method == "HEAD":
            return None
        new.method = request.method
        return new


def hub_request(url: str, what: str, method: str = "GET", start: int = 0) -> http.client.HTTPResponse:
    """-> the server's answer, to HEAD also a 404 or a redirect to another host; UserError where it cannot be reached or refuses."""
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {}, method=method)
        if token := "".join(os.environ.get("HF_TOKEN", "").split()):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return urllib.request.build_opener(SameHostRedirects).open(request, timeout=30)
    except urllib.error.HTTPError as answer:
        if method == "HEAD" and answer.code in (301, 302, 303, 307, 308, 404):
            return answer
        hint = "; is the name right, HF_TOKEN set, and its access granted?" if answer.code in (401, 403) else ""
        raise UserError(f"{what}: {url} answered {answer.code} {answer.reason}{hint}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:          # ValueError: an HF_ENDPOINT that is no address
        raise UserError(f"{what}: not in the local cache, and {url} cannot be reached: {getattr(error, 'reason', error)}") from None


def received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """-> what comes, piece by piece, until its end or until the connection breaks off."""
    with contextlib.suppress(http.client.HTTPException, OSError):
        while chunk := response.read(1 << 20):
            yield chunk


def download(url: str, what: str, blob: Path, size: int, etag: str) -> None:
    """Fetch `size` bytes to `blob`, going on where an earlier attempt broke off; checked against size and hash, then renamed.

    The etag is the sha256 of a large file and git's sha1 of a small one."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(blob.name + ".incomplete")
    part.touch()                                     # an empty file needs no request
    for _ in range(5):                               # a cut connection is taken up again
        if (have := part.stat().st_size) >= size:
            break
        try:
            with (hub_request(url, what, start=have) as response,
                  open(part, "ab" if response.status == 206 else "wb") as file,            # else the server ignores Range
                  tqdm(total=size, initial=file.tell(), desc=what, unit="B", unit_scale=True) as bar):
                for chunk in received(response):
                    bar.update(file.write(chunk))
        except OSError as error:
            raise not_written(part, error) from None
    have = part.stat().st_size
    if have < size:
        raise UserError(f"{what}: the connection broke off at {have} of {size} bytes; run again to go on from there")
    begun = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, lambda: begun).hexdigest()
    if have != size or (len(etag) in (40, 64) and digest != etag):
        part.unlink()
        raise UserError(f"{what}: what was downloaded has not the announced size and hash; it was removed, try again")
    os.replace(part, blob)
