"""Each architecture that transformers has a causal LM for: what works, what is refused; nothing is wrong unseen."""

import warnings

import pytest
import transformers
from architecture_table import STAGES, code, outcome, row
from architectures import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."), reason="docs/architectures.md is of transformers 5.23"
)

EXPECTED = {
    "wwwwwww mlp": """
        afmoe apertus arcee aria_text axk1 bitnet bloom codegen cohere cohere2 cohere2_moe cohere_compass_text
        cwm deepseek_v2 deepseek_v3 doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint
        fuyu gemma gemma2 gemma3 gemma3_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe
        glm4_moe_lite got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
        granite granite_swa helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
        jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral
        ministral3 mistral mixtral moshi nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3
        phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2
        vaultgemma youtu
    """,
    "rrrrrrw intermediate": """
        bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """,
    "wrwwwaw fc1": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper
    """,
    "wwwrwaw mlp": """
        bailing_hybrid kimi_linear olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
        qwen4_exp qwen4_exp_text zaya
    """,
    "cannot be made": """
        blt dots3_note dots3_note_text gemma3n gemma4_assistant gemma4_unified_assistant musicgen
        musicgen_melody
    """,
    "wwwwwaw mlp": """
        axk2 deepseek_v32 glm_moe_dsa hy_v4 inkling2_text
    """,
    "wwwwwwr mlp": """
        beam diffllama emu3 gemma4 gemma4_text
    """,
    "awwrraw mlp": """
        minimax moss_transcribe_diarize openai-gpt
    """,
    "awwrraw none": """
        falcon_mamba mamba mamba2
    """,
    "rrrrrrw none": """
        cpmant prophetnet xlnet
    """,
    "wwwwwww block_sparse_moe": """
        granitemoe granitemoe_swa granitemoeshared
    """,
    "wwwwwww fc1": """
        biogpt opt xglm
    """,
    "wwwwwww ffn": """
        ctrl dbrx mpt
    """,
    "awwrraw feed_forward": """
        bamba reformer
    """,
    "wwwwwaw feed_forward": """
        lfm2_moe lfm3
    """,
    "wwwwwrw feed_forward": """
        llama4 llama4_text
    """,
    "wwwwwrw mlp": """
        inkling_text modernbert-decoder
    """,
    "arwrraw ffn": """
        xlstm
    """,
    "arwrraw none": """
        rwkv
    """,
    "rrrrrrr intermediate": """
        big_bird
    """,
    "rrrrrrr lin1": """
        xlm
    """,
    "wrwrraw mlp_block": """
        recurrent_gemma
    """,
    "wrwrwaw mlp": """
        deepseek_v4
    """,
    "wrwwwaw intermediate": """
        git
    """,
    "wwwrraw feed_forward": """
        jamba
    """,
    "wwwrraw none": """
        zamba
    """,
    "wwwrwar none": """
        zamba2
    """,
    "wwwrwaw block_sparse_moe": """
        granitemoehybrid
    """,
    "wwwrwaw feed_forward": """
        falcon_h1
    """,
    "wwwrwaw mixer": """
        nemotron_h
    """,
    "wwwwwar mlp": """
        gemma3n_text
    """,
    "wwwwwrr mlp": """
        minicpm3
    """,
    "wwwwwrr none": """
        mllama
    """,
    "wwwwwwr mlps.1": """
        longcat_flash
    """,
    "wwwwwwr none": """
        hrm_text
    """,
    "wwwwwww feed_forward": """
        lfm2
    """,
}
"""Outcome, as `code` writes it, to architectures: a letter each for base, padding, beams, drafts, steps, memory and
2 layers (works, reads anew, refused), and the tap."""

FEW = ["llama", "mamba", "bert", "deepseek_v3", "qwen3_next"]  # those that the quick tests try
KNOWN = (
    "gemma2 gemma3_text gpt2 gpt_neox gpt_oss granite mistral mixtral olmo2 phi3 qwen2 qwen2_moe qwen3 smollm3".split()
)
USUAL = {
    *KNOWN,
    *(name for names in EXPECTED.values() for name in names.split()[:: 8 if len(names.split()) > 8 else 1]),
}
"""Those that the usual tests try: the best known, and of many that do the same every eighth; the table has all."""


def check(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of kernels and caches
        found = row(architecture, stages=False)
    expected = next((outcome for outcome, names in EXPECTED.items() if architecture in names.split()), None)
    assert code(found) == expected, found


@pytest.mark.parametrize("architecture", FEW)
def test_some_architectures_do_what_the_table_says(architecture: str) -> None:
    check(architecture)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in USUAL else pytest.mark.table) for name in ARCHITECTURES if name not in FEW],
)
def test_every_architecture_does_what_the_table_says(architecture: str) -> None:
    check(architecture)


STAGED = {
    "rr": """
        bert bert-generation big_bird camembert cpmant data2vec-text electra ernie megatron-bert prophetnet rembert
        roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
        falcon_mamba hrm_text mamba mamba2 rwkv zamba zamba2
        emu3 mllama
    """,
    "rw": """
        inkling_text llama4 llama4_text minicpm3 modernbert-decoder reformer
    """,
}
"""Architectures of which no Memory Decoder, or no MLP Memory either, can be made through all stages."""
FEW_STAGED = ["llama", "gpt2", "bart", "mamba", "llama4", "deepseek_v4", "falcon_h1", "gemma3", "qwen2", "reformer"]


def check_stages(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(architecture)
        found = {name: outcome(check, model) for name, check in STAGES.items()}
    expected = next((letters for letters, names in STAGED.items() if architecture in names.split()), "ww")
    assert code(found | {"tap": ""}).strip() == expected, found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FEW_STAGED)
def test_some_architectures_go_through_all_stages(architecture: str) -> None:
    check_stages(architecture)


@pytest.mark.table
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in FEW_STAGED])
def test_every_architecture_goes_through_all_stages(architecture: str) -> None:
    if architecture in EXPECTED["cannot be made"].split():
        pytest.skip("no tiny model of it can be made here")
    check_stages(architecture)


def test_the_table_names_every_architecture_once() -> None:
    names = [name for group in EXPECTED.values() for name in group.split()]
    assert sorted(names) == sorted(ARCHITECTURES)
