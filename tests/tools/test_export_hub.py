"""Pushing, by huggingface_hub's own code, to a server on this machine that speaks the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
from tiny_adapters import write_adapter
from transformers import GenerationConfig

from lightning_qlora.cli import main
from lightning_qlora.tools import export

TOOL = importlib.import_module("lightning_qlora.tools.export")  # the package's attribute of that name is the function
TOKEN = "hf_of_the_environment"
# huggingface_hub 2 hands files to its HTTP client in the way that the client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LARGE = (".safetensors", ".gguf", "tokenizer.json")


class Hub(ThreadingHTTPServer):
    """What the hub would hold afterwards, and every request that led there."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, bytes]] = []
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.commits = 0


class HubRequest(BaseHTTPRequestHandler):
    """One request: create, validate the card, preupload, LFS batch and upload, or commit."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: dict) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):
        self.server.requests.append(("GET", self.path, b""))
        self.answer(401, {"error": "Invalid username or password."})

    def do_PUT(self):
        body = self.read_body()
        self.server.requests.append(("PUT", self.path, body))
        self.server.objects[self.path.rpartition("/")[2]] = body
        self.answer(200, {})

    def do_POST(self):
        body = self.read_body()
        self.server.requests.append(("POST", self.path, body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/model/preupload/main":
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(LARGE)], "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path == "/me/model.git/info/lfs/objects/batch":
            objects = [
                item | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif self.path == "/api/models/me/model/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, {"error": f"Not found: {self.path}"})

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name.startswith("others/"):
            self.answer(403, {"error": "You don't have the rights to create a model under the namespace 'others'"})
        else:
            self.answer(409 if name in self.server.repositories else 200, {"url": f"{self.server.address}/{name}"})
            self.server.repositories.setdefault(name, wanted)

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                assert len(content) == value["size"]
                self.server.files[value["path"]] = content
        self.server.commits += 1
        self.answer(200, {"commitUrl": f"{self.server.address}/me/model/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # What HF_ENDPOINT and its like become when the library is imported, which it was long ago in this process.
    monkeypatch.setattr(hub_constants, "ENDPOINT", server.address)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    (tmp_path / "login").write_text("hf_of_a_login")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(base, tmp_path):
    """A folder as merge writes it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(base).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    GenerationConfig(eos_token_id=[2]).save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags:\n- merged\n---\n\n# A card", encoding="utf-8")
    (folder / "merge_report.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_push_uploads_the_folder_and_the_file_and_nothing_else(hub, model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")
    export(str(model), str(tmp_path / "model.gguf"), push_to_hub="me/model")
    local = [*model.iterdir(), tmp_path / "model.gguf"]
    assert hub.files == {path.name: path.read_bytes() for path in local}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "model.gguf"} <= hub.files.keys()
    assert hub.repositories["me/model"]["visibility"] == "private"
    printed = capfd.readouterr()
    assert f"Pushed to {hub.address}/me/model." in printed.out
    # The token travels in headers only: it is in no body, no address, no file and no line that was printed.
    assert TOKEN not in printed.out + printed.err + "".join(address for _, address, _ in hub.requests)
    assert all(TOKEN.encode() not in body for *_, body in hub.requests)
    assert all(TOKEN.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_second_push_goes_to_the_repository_that_is_there(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export(str(model), push_to_hub="me/model", private=False)
    assert hub.repositories["me/model"]["visibility"] == "public"
    (model / "README.md").write_text("---\ntags:\n- merged\n---\n\n# Another card", encoding="utf-8")
    export(str(model), push_to_hub="me/model")
    assert hub.files["README.md"] == (model / "README.md").read_bytes()
    assert hub.commits == 2


def test_an_adapter_is_pushed_without_trainer_state_and_local_paths(hub, base, tokenizer, tmp_path, monkeypatch):
    adapter = Path(write_adapter(tmp_path / "adapter", base, tokenizer, manifest=True))
    (adapter / "trainer.ckpt").mkdir()
    (adapter / "trainer.ckpt" / "optimizer").write_bytes(b"state")
    (adapter / ".cache").write_bytes(b"scratch")
    assert "More Information Needed" in (adapter / "README.md").read_text()
    monkeypatch.setattr(TOOL, "base_of", lambda *_: ("org/base", None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export(str(adapter), push_to_hub="me/model")
    local = {path.name for path in adapter.iterdir()} - {"trainer.ckpt", "manifest.json", ".cache"}
    assert hub.files.keys() == local
    assert hub.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b"base_model: org/base" in hub.files["README.md"]
    assert b"More Information" not in hub.files["README.md"]
    assert str(tmp_path).encode() not in b"".join(body for *_, body in hub.requests)


def test_without_a_token_in_the_environment_nothing_is_asked_of_the_hub(hub, model, tmp_path):
    with pytest.raises(ValueError, match="HF_TOKEN; it is not set"):  # though this machine is logged in
        export(str(model), str(tmp_path / "model.gguf"), push_to_hub="me/model")
    assert hub.requests == []
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("token", "repository", "said"),
    [
        ("hf_revoked", "me/model", r"refused the push to 'me/model' with 401 \(Invalid username or password.\)"),
        (TOKEN, "others/model", r"refused the push to 'others/model' with 403 \(You don't have the rights"),
    ],
)
def test_a_refused_token_ends_with_one_message(hub, model, monkeypatch, capfd, token, repository, said):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=said + ".*Write a token with write access to it into .*HF_TOKEN"):
        export(str(model), push_to_hub=repository)
    assert main(["export", f"--folder={model}", f"--push_to_hub={repository}"]) == 1
    printed = capfd.readouterr()
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    assert token not in printed.out + printed.err
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_named(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"The hub at http://127.0.0.1:\d+ could not be reached"):
            export(str(model), push_to_hub="me/model")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be reached.*HF_HUB_OFFLINE"):
        export(str(model), push_to_hub="me/model")
