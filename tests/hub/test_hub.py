"""The model card says what the run says, and a push sends the folder to a hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, read_description
from megatron_progressive.evaluation.results import checksum_of, results_folder
from tests.jobs import Jobs
from tests.train.small_runs import run_values

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_test"


class Hub(BaseHTTPRequestHandler):
    """A hub that holds what is sent: small files in commits, weights by LFS' basic transfer."""

    refuses = ""
    """The part of a path that is answered by 403."""
    stored: dict[str, bytes]
    asked: list[str]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        self.asked.append(f"{self.command} {self.path}")
        values: dict[str, Any] = {}
        own = f"http://127.0.0.1:{self.server.server_address[1]}"
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        status = 401 if not known and "/upload/" not in self.path else 200
        if self.refuses and self.refuses in self.path:
            status = 403
        elif self.path.endswith("whoami-v2"):
            values = {"name": "somebody", "type": "user", "auth": {}}
        elif self.path.endswith("repos/create"):
            asked = json.loads(body)
            values = {"url": f"{own}/{asked['organization']}/{asked['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            values = {"files": [{"path": f["path"], "shouldIgnore": False, "uploadMode":
                                 "lfs" if "safetensors" in f["path"] else "regular"}
                                for f in files]}  # fmt: skip
        elif self.path.endswith("objects/batch"):
            objects = json.loads(body)["objects"]
            values = {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{own}/upload/{one['oid']}"}}}
                for one in objects]}  # fmt: skip
        elif "/upload/" in self.path:
            assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
            self.stored[self.path.rpartition("/")[2]] = body
        elif "/commit/" in self.path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.stored[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
                elif one["key"] == "lfsFile":
                    weights = self.stored.pop(one["value"]["oid"])
                    self.stored[one["value"]["path"]] = weights
            name = self.path.partition("/models/")[2].partition("/commit")[0]
            values = {"commitUrl": f"{own}/{name}/commit/1", "commitOid": "1", "success": True}
        answer = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"stored": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory, jobs: Jobs) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    values = run_values(
        folder, corpus, "run",
        train={"steps": 6, "global_batch": 4, "micro_batch": 4, "eval_every": 2, "eval_samples": 4,
               "save_every": 6},
        expansion=[{"at": 3, "to_layers": 2, "init": "copying_zeroL"}],
    )  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    job = jobs.run(1, folder, ["train", str(folder / "run.yaml")])
    assert job.codes == [0], job.output
    return folder / "run"


def mprog(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: huggingface_hub reads its settings once."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_progressive", *words], cwd=ROOT, text=True,
        capture_output=True, env={**clean, "HF_HUB_DISABLE_XET": "1", **environment},
    )  # fmt: skip


def test_a_card_has_what_the_run_has(run: Path, corpus: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    checkpoint = checkpoint_path(run, 6)
    scores = {"mprog_choices": {"acc,none": 0.375, "acc_stderr,none": 0.1}}
    folder = results_folder(checkpoint)
    folder.mkdir(parents=True)
    for name, checksum in (("own", checksum_of(checkpoint)), ("other", "of other weights")):
        values = {"task": "mprog_choices", "metrics": scores, "checkpoint": {"checksum": checksum},
                  "versions": {"lm_eval": "0.4.13"}}  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(values))
    assert cli.main(["export", "hf", str(run), str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "mprog_choices", "acc", 0.375)  # fmt: skip
    position, model = read_description(checkpoint)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (growth,) = [event for event in events if event["event"] == "expansion"]
    last = [event["loss"] for event in events if event["event"] == "eval"][-1]
    assert model.data is not None
    words = [
        "1 → 2 layers", f"| tokens | {6 * 4 * 32:,} |", f"| 6 | {last:.4f} |",
        f"| 3 | 2 | copying_zeroL | {growth['loss_before']:.4f} → {growth['loss_after']:.4f} |",
        f"content {model.data.fingerprint[:12]}", "| acc | 0.3750 | ± 0.1000 |",
        f"| steps | {position.step} |",
    ]  # fmt: skip
    assert [word for word in words if word not in card.text] == [], card.text
    assert str(tmp_path.parent) not in card.text  # no path of this machine
    assert str(corpus) not in card.text


def test_a_push_sends_the_folder(run: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, handler = hub
    checkpoint, out = checkpoint_path(run, 6), tmp_path / "out"
    words = ["export", "hf", str(checkpoint), str(out), "--push", "somebody/small"]
    done = mprog(*words, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"{endpoint}/somebody/small/commit/1" in done.stdout
    folder = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert handler.stored == folder
    assert {"model.safetensors", "README.md", "config.json", "tokenizer.json"} <= folder.keys()
    assert b"# somebody/small" in folder["README.md"]
    assert "POST /api/repos/create" in handler.asked


def test_a_push_that_cannot_be(run: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, handler = hub
    checkpoint, out = checkpoint_path(run, 6), tmp_path / "out"
    words = ["export", "hf", str(checkpoint), str(out), "--push", "somebody/small"]
    cases: list[tuple[list[str], dict[str, str], str]] = [
        (words, {"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}, "the hub does not answer"),
        (words, {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}, "there is no token"),
        (words, {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_other"}, "does not answer as it should"),
        ([*words[:-1], "a/b/c"], {"HF_ENDPOINT": endpoint}, "accepted: the name of a repository"),
    ]
    for command, environment, line in cases:
        done = mprog(*command, **environment)
        lines = done.stderr.strip().splitlines()
        assert (done.returncode, len(lines)) == (2, 1), done.stderr
        assert line in lines[0]
        assert "--push: got" in lines[0]
        assert not (tmp_path / "out").exists()
    handler.refuses = "/commit/"  # once all is exported
    done = mprog(*words, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert f"hf upload somebody/small {tmp_path / 'out'}" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "model.safetensors").exists()
