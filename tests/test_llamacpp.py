"""llama.cpp in its own process: same logits window by window and token by token; its deaths."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from quantlab.errors import MethodError, ModelError
from quantlab.export import gguf
from quantlab.llamacpp import LlamaCpp
from tests import tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = tiny.tiny("llama")
    return gguf.write(tmp_path / "tiny.gguf", model, {}, {}, "f32")


def test_windows_and_steps_give_the_model_s_own_logits(file: Path) -> None:
    model = tiny.tiny("llama")
    ids = tiny.token_ids(1, 40)[0]
    expected = tiny.logits(model.module, ids[None])[0]
    engine = LlamaCpp(file, threads=1, context=128, every=True)
    parts = dict(engine.chunks(ids))
    engine.close()
    got = torch.cat([parts[start] for start in sorted(parts)])
    # The key-value cache is float16: 2**-11 relative on keys and values of order 1.
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=0)

    engine = LlamaCpp(file, threads=1, context=128)
    token = engine.prefill(ids[:39].tolist())
    assert token == int(expected[38].argmax())
    assert engine.step(int(ids[39])) == int(expected[39].argmax())
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> int:
        seen.append(logits)
        return 3

    engine.choose = choose
    assert engine.prefill(ids.tolist()) == 3
    torch.testing.assert_close(seen[0].double(), expected[39], atol=2e-2, rtol=0)
    assert engine.peak_rss_bytes() > 10_000_000
    assert "llama.cpp" in engine.info
    engine.close()
    engine.close()


def test_a_file_that_is_no_model_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        LlamaCpp(path, threads=1)


def test_a_crash_is_this_variant_s_error(file: Path) -> None:
    engine = LlamaCpp(file, threads=1, context=128)
    os.kill(engine._process.pid, signal.SIGKILL)
    engine._process.wait()
    with pytest.raises(MethodError, match="killed by signal 9"):
        engine.prefill([2, 3])
    engine.close()
