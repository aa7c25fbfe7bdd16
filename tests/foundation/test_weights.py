"""Reading refuses what is not the right checkpoint; downloading goes on where it stopped, keeps only what is right."""

from __future__ import annotations

import hashlib
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cfrbench.errors import WeightsError
from cfrbench.weights import (
    MED2D_ADAPTER,
    copy_checkpoint,
    download,
    fetch_command,
    read_checkpoint,
    recognise,
    weights_folder,
)

CONTENT = bytes(range(256)) * 8192  # 2 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def vit(width: int, depth: int) -> dict[str, Tensor]:
    blocks = {f"image_encoder.blocks.{i}.norm1.bias": torch.zeros(2) for i in range(depth)}
    return {"image_encoder.pos_embed": torch.zeros(1, 2, 2, width), **blocks}


def tiny_vit(*stem: int) -> dict[str, Tensor]:
    return {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(stem)}


# reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"model": t, "epoch": 3},
        lambda t: {"state_dict": t},
        lambda t: {"model": {f"module.{name}": value for name, value in t.items()}},
    ],
)
def test_reads_plain_and_wrapped_state_dicts(tmp_path: Path, wrap: object) -> None:
    path = tmp_path / "a.pth"
    assert callable(wrap)
    torch.save(wrap({"x": torch.arange(3)}), path)
    assert read_checkpoint(path)["x"].tolist() == [0, 1, 2]


def test_reads_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3)}, path)
    assert read_checkpoint(path)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    with pytest.raises(WeightsError, match=r"no checkpoint at .*none"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.97])
def test_a_truncated_file_is_called_so(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a{suffix}"
    tensors = {"x": torch.randn(1000)}
    torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(WeightsError, match="cut off after"):
        read_checkpoint(path)


class Harmful:
    """Anything but tensors."""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_error_page_is_not_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html><html><body>Sign in to download this file</body></html>")
    with pytest.raises(WeightsError, match="not a checkpoint"):
        read_checkpoint(path)


class Wipes:
    """Runs a command when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.remove, (str(self.victim),)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"x": torch.zeros(2)}, "args": x}])
def test_a_file_that_would_run_code_is_refused_and_explained(tmp_path: Path, wrap: Callable[[object], object]) -> None:
    path, victim = tmp_path / "a.pth", tmp_path / "victim"
    victim.write_text("still here")
    torch.save(wrap(Wipes(victim)), path)
    with pytest.raises(WeightsError, match=r"would have to run `\w+\.remove`.*nothing was run.*weights_only=False"):
        read_checkpoint(path)
    assert victim.exists()


def test_an_object_among_the_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"x": torch.zeros(2)}, "args": Harmful()}, path)
    with pytest.raises(WeightsError, match=r"holds more than tensors.*`tests\.foundation\.test_weights\.Harmful`"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2)])
def test_other_contents_are_refused_without_running_them(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="not a checkpoint"):
        read_checkpoint(path)


def test_the_checksum_may_be_its_first_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_checkpoint(path, digest[:6]).keys() == read_checkpoint(path, digest.upper()).keys() == {"x"}
    wrong = ("0" if digest[0] != "0" else "1") + digest[1:6]
    with pytest.raises(WeightsError, match=f"{digest}, expected {wrong}"):
        read_checkpoint(path, wrong)


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (vit(768, 12), "SAM ViT-B"),
        (vit(1024, 24), "SAM ViT-L"),
        (vit(1280, 32), "SAM ViT-H"),
        (vit(32, 2), "a SAM of 2 blocks and width 32"),
        (tiny_vit(32, 3, 1, 1), "LiteMedSAM"),
        (tiny_vit(32, 3, 3, 3), "MobileSAM"),
        (tiny_vit(8, 3, 5, 5), "a TinyViT with an unknown stem"),
        (vit(768, 12) | {MED2D_ADAPTER: torch.zeros(1)}, "SAM-Med2D"),
        ({"conv.weight": torch.zeros(1)}, "no SAM-like model"),
    ],
)
def test_models_are_recognised_and_others_refused(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    assert recognise(state) == name
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    assert read_checkpoint(path, expected=name).keys() == state.keys()
    with pytest.raises(WeightsError, match=f"is {name}, but SAM ViT-X was asked for"):
        read_checkpoint(path, expected="SAM ViT-X")


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CFRBENCH_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "cfrbench" / "weights"
    monkeypatch.setenv("CFRBENCH_WEIGHTS", str(tmp_path / "own"))
    assert weights_folder() == tmp_path / "own"


def test_the_command_survives_spaces(tmp_path: Path) -> None:
    target = tmp_path / "my weights" / "a.pth"
    words = shlex.split(fetch_command("https://host/a.pth", target))
    assert words[0] == "curl"
    assert words[words.index("--output") + 1] == str(target)
    assert words[-1] == "https://host/a.pth"


# fetching -----------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ``breaks_after`` bytes it hangs up, once; ``resumes`` says whether it honours Range."""

    breaks_after: int | None = None
    resumes = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.starts: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/model.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.resumes else 0
        self.server.starts.append(start)
        if self.server.status != 200 or start >= len(CONTENT):
            self.send_error(416 if self.server.status == 200 else self.server.status)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end, self.server.breaks_after = self.server.breaks_after, None
        self.wfile.write(CONTENT[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the surroundings has no business with the loopback server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_download_is_whole_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "new" / "model.pth"
    assert download(server.url, target, DIGEST[:6], lambda done, total: seen.append((done, total))) == target
    assert target.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert [path.name for path in target.parent.iterdir()] == ["model.pth"]


def test_a_finished_download_is_not_repeated(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        download(server.url, tmp_path / "model.pth", DIGEST)
    assert server.starts == [0]


@pytest.mark.parametrize("resumes", [True, False])
def test_download_goes_on_after_a_break(server: Server, tmp_path: Path, resumes: bool) -> None:
    target, server.breaks_after, server.resumes = tmp_path / "model.pth", 700_000, resumes
    with pytest.raises(WeightsError, match=r"broke off after 700,000 of 2,097,152 bytes.*goes on"):
        download(server.url, target, DIGEST)
    assert not target.exists()
    seen: list[tuple[int, int]] = []
    download(server.url, target, DIGEST, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert server.starts == [0, 700_000 if resumes else 0]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_part_that_is_already_whole_is_verified_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "model.pth", DIGEST)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_wrong_bytes_are_removed(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    with pytest.raises(WeightsError, match=rf"{DIGEST}, expected badbad\.\.\."):
        download(server.url, target, "badbad")
    assert list(tmp_path.iterdir()) == []


def test_a_spoilt_part_does_not_survive(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(b"x" * 1000)
    with pytest.raises(WeightsError, match="It was removed"):
        download(server.url, tmp_path / "model.pth", DIGEST)
    download(server.url, tmp_path / "model.pth", DIGEST)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_wrong_file_in_place_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    target.write_bytes(b"mine")
    with pytest.raises(WeightsError, match="Remove it"):
        download(server.url, target, DIGEST)
    assert target.read_bytes() == b"mine"
    assert server.starts == []


def test_without_a_published_digest_the_length_decides(server: Server, tmp_path: Path) -> None:
    target, server.breaks_after = tmp_path / "model.pth", 700_000
    with pytest.raises(WeightsError, match="broke off"):
        download(server.url, target, None)
    for _ in range(2):
        download(server.url, target, None)
    assert target.read_bytes() == CONTENT
    assert server.starts == [0, 700_000]


def test_refusals_of_the_server_are_explained(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(WeightsError, match="answered 404"):
        download(server.url, tmp_path / "model.pth", DIGEST)


def test_an_absent_server_is_explained(tmp_path: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(WeightsError, match=r"cannot be fetched.*no network.*model get NAME --from FILE"):
        download(url, tmp_path / "model.pth", DIGEST)


def test_an_unusable_folder_is_explained(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        download(server.url, tmp_path / "file" / "model.pth", DIGEST)


# copying ------------------------------------------------------------------------------------------------------------


def test_a_copy_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "mine.pth", tmp_path / "new" / "model.pth"
    for content in (b"first", b"second"):
        source.write_bytes(content)
        assert copy_checkpoint(source, target) == target
        assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["model.pth"]


def test_a_file_already_in_its_place_stays(tmp_path: Path) -> None:
    source = tmp_path / "model.pth"
    source.write_bytes(b"content")
    assert copy_checkpoint(source, tmp_path / "." / "model.pth").read_bytes() == b"content"


def test_a_copy_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    source = tmp_path / "mine.pth"
    source.write_bytes(b"content")
    with pytest.raises(WeightsError, match=r"cannot be written.*CFRBENCH_WEIGHTS"):
        copy_checkpoint(source, source / "model.pth")
