"""From names to trusted files: what is found, what is refused, and in which words."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.models import ARTIFACT_FILE, load, locate
from tests.tiny import GENERIC, logits, randomize, raw_model, saved, tiny, token_ids, tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny", tied=True)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of a sound model folder, to be spoilt."""
    return shutil.copytree(made, tmp_path / "tiny")


def refusal(name: str | Path, **flags: bool) -> str:
    """The one message with which loading this is refused; it is short and on one line."""
    with pytest.raises(ModelError) as caught:
        load(str(name), **flags)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "opt", "neox", GENERIC])
def test_a_folder_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    original = raw_model(name)
    randomize(original, 5)
    model = load(str(saved(tmp_path / name, name, seed=5)))
    assert model.source.kind == "folder"
    assert model.gguf is None
    assert model.module.dtype == torch.float32
    ids = token_ids(1, 16)
    torch.testing.assert_close(
        logits(model.module, ids), logits(original.eval(), ids), rtol=1e-5, atol=1e-5
    )
    assert bool(model.notes) == (name == GENERIC)
    assert all("generic path" in note for note in model.notes)


def test_fingerprints_follow_weights_and_configuration(folder: Path, tmp_path: Path) -> None:
    first = locate(str(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert locate(str(moved)).fingerprint == first.fingerprint
    (moved / "notes.md").write_text("nothing that matters")
    assert locate(str(moved)).fingerprint == first.fingerprint
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    changed = locate(str(moved)).fingerprint
    assert changed != first.fingerprint
    state = load_file(moved / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, moved / "model.safetensors", metadata={"format": "pt"})
    assert locate(str(moved)).fingerprint not in (changed, first.fingerprint)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path, part: float) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part) - 1])


def cut_rows(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name][:50].contiguous()


UP = "model.layers.0.mlp.up_proj.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json", "read"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["JSON object"]),
    "unknown architecture": (lambda f: change_config(f, model_type="quux"), ["quux"]),
    "no architecture": (lambda f: change_config(f, model_type=None), ["model_type"]),
    "no language model": (lambda f: change_config(f, model_type="clip"), ["CLIPConfig"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no .safetensors weights"]),
    "truncated": (lambda f: cut(f, 0.5), ["model.safetensors is corrupt or truncated", "again"]),
    "last byte gone": (lambda f: cut(f, 1.0), ["model.safetensors is corrupt or truncated"]),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), ["corrupt"]),
    "text for weights": (lambda f: (f / "model.safetensors").write_text("hello"), ["corrupt"]),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        ["cannot be loaded", "tokenizer"],
    ),
    "a tensor is missing": (
        lambda f: change_weights(f, lambda state: state.pop(UP)),
        ["incomplete", "1 tensors are missing", UP],
    ),
    "a tensor has another shape": (
        lambda f: change_weights(f, lambda state: cut_rows(state, UP)),
        ["incomplete", "another shape", UP],
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_folder_is_refused_in_one_message(how: str, folder: Path) -> None:
    spoil, words = SPOILT[how]
    spoil(folder)
    message = refusal(folder)
    for word in words:
        assert word in message


def test_a_missing_shard_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    raw_model("llama").save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load(str(folder))
    shards[1].unlink()
    assert shards[1].name in refusal(folder)


# --- pickles and remote code -------------------------------------------------------------------


class Exploit:
    """Writes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "model.pt"])
def test_pickles_are_refused_unread(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Exploit(marker)))
    message = refusal(folder)
    assert name in message
    assert "--allow-pickle" in message
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_never_read(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(marker)))
    load(str(folder))
    assert not marker.exists()


def test_other_safetensors_do_not_let_a_pickle_in(folder: Path, tmp_path: Path) -> None:
    """An adapter beside a pickle looks like safe weights; transformers would take the pickle."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


def test_pickles_load_when_allowed(folder: Path) -> None:
    wanted, ids = load(str(folder)), token_ids(1, 16)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = load(str(folder), allow_pickle=True)
    assert torch.equal(logits(model.module, ids), logits(wanted.module, ids))
    assert model.source.fingerprint != wanted.source.fingerprint


REMOTE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_remote_code_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(folder, model_type="own", auto_map=classes)
    message = refusal(folder)
    assert "own Python code" in message
    assert "--trust-remote-code" in message
    assert not marker.exists()


# --- other names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("bundeld", "no such file or folder: bundeld"),
        ("/no/such/folder", "no such file or folder"),
        ("./models/none", "no such file or folder"),
        ("owner/model.gguf", "no such file or folder"),
        ("~no-such-user/model", "no such file or folder"),
        ("nul/\0byte", "no such file or folder"),
        ("owner/name with spaces", "no such file or folder"),
        ("owner/name/more", "no such file or folder"),
        ("x" * 5000, "no such file or folder: xxx"),
    ],
    ids=lambda value: value[:20].replace("\0", "0"),
)
def test_names_that_lead_nowhere(name: str, words: str) -> None:
    message = refusal(name)
    assert words in message
    assert "a Hub id" in message
    assert "a .gguf file" in message


@pytest.mark.parametrize("name", ["story.txt", "model.safetensors", "weights.bin"])
def test_a_file_that_is_no_gguf(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Once upon a time")
    message = refusal(tmp_path / name)
    assert name in message
    assert "not a .gguf" in message
    assert "folder" in message


def test_a_quantized_folder_is_no_original(tmp_path: Path) -> None:
    (tmp_path / ARTIFACT_FILE).write_text("{}")
    (tmp_path / "cache").mkdir()
    assert locate(str(tmp_path)).kind == "quantlab"
    assert "already quantized" in refusal(tmp_path)


# --- the Hub -----------------------------------------------------------------------------------


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal("nobody/no-such-model")
    assert "nobody/no-such-model" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError(), ValueError("?")])
def test_a_hub_out_of_reach(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, name: str, timeout: float) -> None:
        assert timeout <= 10
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    message = refusal("nobody/no-such-model")
    for word in ("nobody/no-such-model", "spelling", "network", "bundled", type(error).__name__):
        assert word in message


def test_a_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached = made / "snapshots" / "abc123" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: str(cached))
    source = locate("owner/name")
    assert (source.kind, source.path, source.fingerprint) == ("hub", None, "hub:abc123")


# --- GGUF --------------------------------------------------------------------------------------


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring channels, transformers those half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(path: Path, architecture: str = "llama", tensors: bool = True) -> Path:
    """The tiny llama as llama.cpp's converter would write it, float32."""
    model = tiny("llama", seed=8)
    config = model.module.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.module.state_dict().items() if tensors else ():
        values = tensor.numpy()
        if "q_proj" in name:
            values = interleave(values, config.num_attention_heads)
        if "k_proj" in name:
            values = interleave(values, config.num_key_value_heads)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_loads_with_its_tokenizer(tiny_gguf: Path) -> None:
    model, ids = load(str(tiny_gguf)), token_ids(1, 16)
    assert (model.source.kind, model.gguf, model.family.name[:5]) == ("gguf", tiny_gguf, "Llama")
    torch.testing.assert_close(
        logits(model.module, ids), logits(tiny("llama", seed=8).module, ids), rtol=1e-4, atol=1e-4
    )
    text = "The river carried timber to the coast."
    assert model.tokenizer(text).input_ids == tokenizer()(text).input_ids


@pytest.mark.parametrize("part", [4, 10, 40, 200, 0.2, 0.5, 0.9, -100, -1])
def test_a_truncated_gguf(part: float, tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    message = refusal(short)
    assert "short.gguf is a corrupt or truncated GGUF file" in message
    assert "fetch it again" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a GGUF file"),
        (b"GG", "is not a GGUF file"),
        (b"Once upon a time " * 99, "is not a GGUF file"),
        (b"GGUF\xff\xff\xff\xff" + bytes(99), "corrupt"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 99, "corrupt"),
        (b"GGUF\x03\0\0\0" + bytes(99), "without a language model"),
    ],
)
def test_a_gguf_that_is_none(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "odd.gguf").write_bytes(data)
    message = refusal(tmp_path / "odd.gguf")
    assert "odd.gguf" in message
    assert words in message


def test_a_gguf_without_tensors_or_of_unknown_architecture(tmp_path: Path) -> None:
    empty = write_gguf(tmp_path / "empty.gguf", tensors=False)
    assert "without a language model" in refusal(empty)
    strange = write_gguf(tmp_path / "strange.gguf", "quux")
    assert "quux" in refusal(strange)


def test_loading_restores_warnings_and_progress_bars(folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    load(str(folder))
    (folder / "config.json").unlink()
    refusal(folder)
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()
