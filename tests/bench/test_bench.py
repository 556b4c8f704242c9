"""`bench` on a tiny random model: the document's keys and figures, the table, what it refuses.

No test looks at how fast anything is: where figures matter, the clock is the test's own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import build
from quantlab.bench import contest, run, sides, subjects
from quantlab.bench.spec import BLOCKWISE, GENERATED, PARTS, BenchSpec, Weights, goal
from quantlab.cli import main
from quantlab.errors import ConfigError
from tests import tiny

NATIVE = "QuantLab native"


@pytest.fixture(scope="module")
def compiled() -> None:
    """A benchmark of compiled kernels needs a compiler."""
    try:
        build.library(build.chosen())
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.saved(tmp_path / "tiny", tied=True)


def document_of(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return document


def check_entry(entry: dict[str, Any], *peers: str) -> None:
    """A speed with its peers, and the ratio that they make."""
    assert [name for name in ("quantlab", "llama.cpp", "transformers") if name in entry] == [
        "quantlab",
        *peers,
    ]
    assert entry["quantlab"] > 0
    low, high = entry["range"]["quantlab"]
    assert low <= entry["quantlab"] <= high
    if peers:
        assert entry["ratio"] == entry["quantlab"] / entry[peers[0]]
    assert ("goal" in entry) <= ("ratio" in entry)


def test_a_tiny_model_without_llamacpp(
    compiled: None, home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end from the command line; llama.cpp, which is not asked for, is not started."""
    out = tmp_path / "out.json"
    arguments = ["--model", str(model), "--threads", "1", "--quick", "--json", str(out)]
    assert main(["bench", *arguments]) == 0
    document = document_of(out)
    assert list(document) == [
        *("schema", "environment", "models", "decode", "prefill"),
        *("gemv_fraction_of_bandwidth", "prefill_fraction_of_peak", "gemv", "linears"),
    ]
    assert document["schema"] == 1
    names = ["q4", "q4-exact", "q8", "q8-exact", "q3", "q2", "bf16", "w8a8"]
    assert list(document["decode"]) == [f"{name}/tiny/1" for name in names]
    assert list(document["prefill"]) == [
        f"{name}/tiny/1" for name in names if name not in ("q3", "q2")
    ]
    for part in ("decode", "prefill"):
        for key, entry in document[part].items():
            beside = key.split("/")[0] in ("bf16", "w8a8")
            check_entry(entry, *(["transformers"] if beside else []))
            assert ("ratio_to_unquantized" in entry) == (not key.startswith("bf16/"))
    kinds = [f"q{bits}{how}/1" for bits in (4, 8, 2, 3) for how in ("", "-exact")]
    assert list(document["gemv_fraction_of_bandwidth"]) == kinds
    products = [f"{name}/1" for name in ("w8a8", "q4", "q4-exact", "q8", "bf16")]
    assert list(document["prefill_fraction_of_peak"]) == products
    for short, long in (
        ("gemv", "gemv_fraction_of_bandwidth"),
        ("linears", "prefill_fraction_of_peak"),
    ):
        for key, entry in document[short].items():
            assert document[long][key] == entry["fraction"] > 0
            assert entry["machine"] > 0
    environment = document["environment"]
    assert environment["native"] == build.chosen().label
    assert environment["llama.cpp"] is None
    assert environment["threads"] == [1]
    printed = capsys.readouterr()
    assert "q4/tiny/1" in printed.out
    assert "1 thread" in printed.err


def test_beside_llamacpp_at_the_bits_of_its_file(
    compiled: None, home: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ratio is against the type of as many bits, and QuantLab's tied head has the bits of
    the head in that file (width 64 is no K block: q8_0), as its header says."""
    monkeypatch.setattr(run, "check_peer", lambda: "a build")
    spec = BenchSpec(
        models=(str(model),), llamacpp=True, threads=(1,), parts=("decode",), quick=True
    )
    document = run.run(spec, lambda line: None)
    for bits in ("4", "8"):
        for how in ("", "-exact"):
            entry = document["decode"][f"q{bits}{how}/tiny/1"]
            check_entry(entry, "llama.cpp")
            assert entry["peer"] == f"llama.cpp Q{bits}_0"
    for bits in ("2", "3"):
        check_entry(document["decode"][f"q{bits}/tiny/1"])
    facts = document["models"]["tiny"]
    assert facts["peers"]["llama.cpp Q4_0"]["head"] == "q8_0"
    assert facts["weights"]["q4"]["head_bits"] == facts["weights"]["q4"]["embedding_bits"] == 8
    assert document["prefill"] == {}
    assert document["environment"]["llama.cpp"] == "a build"
    kept = sorted(path.name for path in (home / "bench").iterdir())
    assert [name.rpartition("-")[2] for name in kept] == ["q4_0.gguf", "q8_0.gguf"]


# --- the figures -----------------------------------------------------------------------------


class Clockwork:
    """Reads a prompt or a token in seconds that are known, in turn from `prompt` and `token`."""

    def __init__(self, prompt: Iterator[float], token: Iterator[float]) -> None:
        self.prompt, self.token = prompt, token
        self.read: list[int] = []

    def side(self, name: str, parts: tuple[str, ...] = PARTS[:2]) -> sides.Side:
        def prefill(ids: Sequence[int]) -> float:
            self.read.append(len(ids))
            return next(self.prompt)

        def decode(ids: Sequence[int], count: int) -> float:
            self.read.append(-count)
            return count * next(self.token)

        return sides.Side(name, prefill, decode, parts)


def test_figures_are_medians_and_ratios_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds in which both are slow for a while; the warm-up counts for nothing."""
    monkeypatch.setattr(contest, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(contest, "PAUSE_SECONDS", 0.0)
    ours = Clockwork(iter([1.0, 4.0, 2.0]), iter([9.0, 0.01, 0.04, 0.02]))
    theirs = Clockwork(iter([2.0, 8.0, 4.0]), iter([9.0, 0.02, 0.08, 0.05]))
    tokens = contest.draw(100, None, quick=False)
    rates = contest.take_turns(
        [ours.side("q4"), theirs.side("llama.cpp Q4_0")], tokens, ("decode", "prefill")
    )
    assert (len(tokens.prompt), len(tokens.short), tokens.decoded) == (512, 64, 32)
    # Nine seconds a token: so slow a side decodes a quarter.
    assert ours.read == [-2, -8, 512] + [-8, 512] * 2
    entry = contest.compared(
        rates, "decode", "q4", ("llama.cpp", "llama.cpp Q4_0"), "llama.cpp Q4_0", 1.2
    )
    assert entry["quantlab"] == pytest.approx(50.0)
    assert entry["llama.cpp"] == pytest.approx(20.0)
    assert entry["ratio"] == pytest.approx(2.5)
    assert entry["ratio_to_unquantized"] == pytest.approx(2.5)
    assert entry["range"]["quantlab"] == pytest.approx([25.0, 100.0])
    assert (entry["goal"], entry["rounds"]) == (1.2, 3)
    entry = contest.compared(rates, "prefill", "q4", ("llama.cpp", "no such side"), None, 1.5)
    assert entry["quantlab"] == statistics.median([512 / 1.0, 512 / 4.0, 512 / 2.0])
    assert not {"ratio", "goal", "ratio_to_unquantized"} & set(entry)


def test_a_side_measures_only_its_parts() -> None:
    one = Clockwork(iter([]), iter([0.001] * 2))
    rates = contest.take_turns(
        [one.side("q2", ("decode",))], contest.draw(9, 20, True), ("decode", "prefill"), quick=True
    )
    assert list(rates) == [("decode", "q2")]


def test_tokens_fit_the_context_and_the_vocabulary() -> None:
    tokens = contest.draw(7, 20, quick=False)
    assert len(tokens.prompt) == 20
    assert len(tokens.short) + tokens.decoded <= 20
    assert set(tokens.prompt) <= set(range(7))
    assert tokens == contest.draw(7, 20, quick=False)


def test_goals() -> None:
    assert goal("decode", "q4", "bundled") == 1.2
    assert goal("decode", "q4", GENERATED) == 1.1
    assert goal("decode", "q8", GENERATED) == 1.2
    assert goal("decode", "q4-exact", "bundled") is None


def test_bits_of_head_and_embedding_are_those_of_the_peer_s_file() -> None:
    """Two oracles: what llama.cpp's own tool writes at width 256 (Q6_K where Q4_0 was asked for,
    head only), and Q8_0 throughout."""
    rows = {row.name: row for row in BLOCKWISE}
    tied, untied = (tiny.tiny(width=256, blocks=1, tied=tied) for tied in (True, False))
    assert subjects.outer_of(tied, rows["q4"], 64).outer_bits() == (6, 6)
    assert subjects.outer_of(untied, rows["q4"], 64).outer_bits() == (4, 6)
    assert subjects.outer_of(untied, rows["q8"], 64).outer_bits() == (8, 8)
    assert subjects.outer_of(untied, Weights("bf16", None, 16), 64).outer_bits() == (16, 16)


def test_the_generated_model_is_written_and_packed_block_by_block(
    compiled: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made small here: its blocks hold equal weights in memory of their own, packed as well."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    monkeypatch.setattr(
        subjects,
        "SHAPE",
        small | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    )
    source = tiny.saved(home / "bundled", tied=True)
    monkeypatch.setattr(subjects, "prepare_bundled", lambda: source)
    monkeypatch.setattr(subjects.bundled, "find_gguf", lambda: None)
    model = subjects.read(GENERATED, torch.bfloat16)
    first, second = (block.mlp.up_proj.weight for block in model.module.base_model.layers)
    assert first.shape == (128, 64)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert 0.5 < float(first.float().std()) * 64**0.5 < 1.5
    assert torch.equal(first, subjects.read(GENERATED, torch.bfloat16).module.base_model.layers[1]
                       .mlp.up_proj.weight)  # fmt: skip
    path = subjects.gguf_file(model, "q4_0")
    assert subjects.peer_facts(path)["bytes"] > 0
    facts = subjects.pack(model, BLOCKWISE[0], 64)
    one, two = (block.mlp.up_proj for block in model.module.base_model.layers)
    assert one.choice.kernel == NATIVE
    assert torch.equal(one.weight_packed.dequantize(), two.weight_packed.dequantize())
    assert one.prepared.matrix.tensors["codes"].data_ptr() != (
        two.prepared.matrix.tensors["codes"].data_ptr()
    )
    assert facts["bits"] == 4


# --- what is refused -------------------------------------------------------------------------


WRONG = [
    (["--threads", "0"], "--threads: numbers from 1"),
    (["--threads", "two"], "--threads: 'two': whole numbers"),
    (["--threads", "1,1"], "1 is named twice"),
    (["--threads", ","], "--threads: numbers from 1"),
    (["--only", "decode,speed"], "--only: speed; choose decode, prefill, gemv, linears"),
    (["--only", ""], "--only: empty"),
    (["--model", ","], "--model: name at least one"),
    (["--model", "no/such/folder"], "no such file or folder"),
    (["--model", "bundled,bundled"], "bundled is named twice"),
    (["--group-size", "4"], "--group-size: at least 8"),
    (["--against", "vllm"], "--against"),
    (["--json", "no/such/folder/out.json"], "--json: "),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_arguments_are_one_line(
    compiled: None,
    home: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "measure_model", None)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert message in line
    assert not home.exists()


def with_build(monkeypatch: pytest.MonkeyPatch, info: str, features: list[str]) -> None:
    monkeypatch.setattr(sides, "build_info", lambda: info)
    monkeypatch.setattr(sides, "machine", lambda: {"cpu_features": features})


def test_a_crippled_llamacpp_is_refused(
    compiled: None,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is loaded or measured: exit code 2, one line, nothing written."""
    with_build(monkeypatch, "llama.cpp (AVX2)", ["avx2", "avx512_vnni"])
    monkeypatch.setattr(run, "measure_model", None)
    out = tmp_path / "out.json"
    assert main(["bench", "--against", "llama.cpp", "--json", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "llama.cpp (AVX2) was built without AVX512-VNNI" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("info", "features"),
    [
        ("llama.cpp (AVX2, AVX512_VNNI)", ["avx2", "avx512_vnni"]),
        ("llama.cpp (AVX2)", ["avx2", "avx_vnni"]),
        ("llama.cpp (NEON)", []),
    ],
)
def test_a_build_with_all_that_the_cpu_has_is_taken(
    monkeypatch: pytest.MonkeyPatch, info: str, features: list[str]
) -> None:
    with_build(monkeypatch, info, features)
    assert sides.check_peer() == info


def test_a_missing_llamacpp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        sides.check_peer()


def test_no_native_kernels_nothing_to_measure(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise build.BuildError("no C++ compiler was found")

    monkeypatch.setattr(run.native, "native", missing)
    assert main(["bench", "--quick"]) == 2
    assert "no C++ compiler was found" in capsys.readouterr().err
