"""What TRL's own tests load from a hub, made here: tiny models with random weights, tokenizers, a data set.

    write(Path("hub"), SHORT)  # from_pretrained and load_dataset find these names where the working directory is "hub"

In: a folder. Out: in it, under the names on the hub, models of the same classes and sizes as TRL's (two layers, eight
dimensions), saved in bfloat16 as there, and the data set of prompts in both of its formats.
The tokenizers are not the real ones: a token a byte, but for words of the chat templates and the ids that TRL's tests
write down (of Qwen2.5, most in tool calls), which stand for the text that the tests say. Those ids need a vocabulary of
152,064, LONG; other tests take a tenth of the time with a SHORT one. Chat templates are those in TRL's package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

ORGANIZATION = "trl-internal-testing"

PROMPTS = [  # the Zen of Python, as TRL cuts it: tests compare these
    "Beautiful is better than", "Explicit is", "Simple is better", "Complex", "Flat is better than", "Sparse is better",
    "Readability", "Special cases aren't special", "Although practicality beats", "Errors should never",
    "Unless explicitly", "In the face of ambiguity, refuse", "There should be one-- and preferably",
    "Although that way may not be obvious at first unless you're", "Now is", "Although never is often",
    "If the implementation is hard to explain,", "If the implementation is easy", "Namespaces are one honking great",
]  # fmt: skip
TEST = 2  # the last rows are the test split

END, START, STOP = 151643, 151644, 151645  # of Qwen2.5
WORDS = {  # ids of Qwen2.5 that are longer than a byte, as TRL's tests spell them
    293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</", 606: "name", 788: '":',
    894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know", 1513: " don", 2765: " won", 4913: '{"',
    5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n",
    13477: "crement", 14172: "tool", 16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool",
    35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
}  # fmt: skip
TOLD = """ got an unexpected keyword argument user assistant async_multiply_tool multiply_tool error function
 description parameters properties required integer string type The first second The product of the two integers
 Multiplies Asynchronously multiplies Args Returns Increment the internal counter Value to add to the counter step"""
SPECIAL = {
    END: "<|endoftext|>",
    START: "<|im_start|>",
    STOP: "<|im_end|>",
    151657: "<tool_call>",
    151658: "</tool_call>",
}


def tokenizer(
    template: str, words: Mapping[int, str], special: Mapping[int, str], stop: int, pad: int
) -> PreTrainedTokenizerFast:
    """A token a byte, but for these words, by these ids, and those of the template; no text has the words of others."""
    shown = _byte_level()
    chat = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    spelt = {i: "".join(shown[b] for b in word.encode()) for i, word in words.items()} | dict(special)
    free = [i for i in range(256, max(special)) if i not in spelt]
    common = dict.fromkeys(re.findall(r"\s?[A-Za-z_]{2,}", TOLD + chat)).keys()
    more = ["".join(shown[b] for b in word.encode()) for word in common]
    spelt |= zip(free, (word for word in more if word not in spelt.values()), strict=False)
    tokens = list(shown.values()) + [spelt.get(i, f"{shown[32]}w{i}") for i in range(256, max(special) + 1)]
    model = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], unk_id=0))  # the fewest tokens
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=special[stop], pad_token=special[pad],
        additional_special_tokens=[t for i, t in special.items() if i not in (stop, pad) and not t.endswith("call>")],
    )  # fmt: skip
    made.add_tokens([t for t in special.values() if t.endswith("call>")])
    made.chat_template = chat
    return made


def _byte_level() -> dict[int, str]:
    """The letter that stands for each byte, as GPT-2 has it and in the order of its ids: printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---- models ---------------------------------------------------------------------------------------------------------

SMALL = {256: "<|pad|>", 257: "<|end|>", 258: "<|finetune_right_pad_id|>"}
TINY = dict(
    hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=32
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2)

Kind = tuple[int, Callable[[str], PreTrainedTokenizerFast], int, int]  # vocabulary, tokenizer, its stop and pad
LONG: Kind = (152064, lambda template: tokenizer(template, WORDS, SPECIAL, STOP, END), STOP, END)
_LESS = 151_000
SHORT: Kind = (
    16384,
    lambda template: tokenizer(template, {}, {i - _LESS: t for i, t in SPECIAL.items()}, STOP - _LESS, END - _LESS),
    STOP - _LESS,
    END - _LESS,
)
OTHER: Kind = (16384, lambda template: tokenizer(template, {}, SMALL, 257, 256), 257, 256)

MODELS: dict[str, tuple[str, Kind | None, str, dict[str, Any]]] = {  # None: of Qwen, and so of what write() is told
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", None, "qwen2_5", TINY),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", None, "qwen2_5", TINY),
    "tiny-Qwen3ForCausalLM": ("Qwen3", None, "qwen3", TINY | {"head_dim": 128}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3", None, "qwen3", TINY | {"head_dim": 128}),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3Moe", None, "qwen3", TINY | EXPERTS | {"num_experts": 4, "head_dim": 128, "norm_topk_prob": True},
    ),
    "tiny-LlamaForSequenceClassification-3.2": ("Llama", OTHER, "llama3_2", TINY),
    "tiny-Gemma2ForCausalLM": ("Gemma2", OTHER, "gemma", TINY | {"head_dim": 2, "query_pre_attn_scalar": 2}),
    "tiny-Cohere2ForCausalLM": (
        "Cohere2", OTHER, "cohere2",
        TINY | {"layer_types": ["sliding_attention", "full_attention"], "logit_scale": 1.0},
    ),
    "tiny-GptOssForCausalLM": ("GptOss", OTHER, "gptoss", TINY | EXPERTS | {"num_local_experts": 4}),
    "tiny-Glm4MoeForCausalLM": ("Glm4Moe", OTHER, "glm4moe", TINY | EXPERTS | {"n_routed_experts": 4}),
    "tiny-NemotronHForCausalLM-nano": (
        "NemotronH", OTHER, "nemotron_3_nano",
        EXPERTS | dict(
            hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
            layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=8, mamba_head_dim=4, mamba_n_groups=1,
            ssm_state_size=16, n_routed_experts=4, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32,
            use_mamba_kernels=False,
        ),
    ),
}  # fmt: skip

REMOTE = """from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def _model(kind: str, task: str, size: int, stop: int, pad: int, sizes: Mapping[str, Any]) -> PreTrainedModel:
    """Matrices of unit gain, so that what a layer computes is not lost in the residual."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, bos_token_id=None, eos_token_id=stop, pad_token_id=pad,
        **sizes | ({"num_labels": 1} if "Sequence" in task else {}),
    )  # fmt: skip
    model: PreTrainedModel = getattr(transformers, f"{kind}{task}")(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model.to(torch.bfloat16)


def _save(folder: Path, name: str, qwen: Kind) -> None:
    kind, given, template, sizes = MODELS[name]
    size, words, stop, pad = given or qwen
    task = "ForSequenceClassification" if "Sequence" in name else "ForCausalLM"
    model = _model(kind, task, size, stop, pad, sizes)
    model.save_pretrained(folder / name)
    words(template).save_pretrained(folder / name)
    if task == "ForCausalLM":
        GenerationConfig(eos_token_id=stop, pad_token_id=pad).save_pretrained(folder / name)


def _save_remote(folder: Path) -> None:
    """A model whose code is beside its weights, which transformers runs only where it is trusted."""
    place = folder / "tiny-RemoteForCausalLM"
    size, words, stop, pad = OTHER
    _model("Llama", "ForCausalLM", size, stop, pad, TINY).save_pretrained(place)
    words("llama3_2").save_pretrained(place)
    config = json.loads((place / "config.json").read_text()) | {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"},
    }
    (place / "config.json").write_text(json.dumps(config))
    (place / "remote.py").write_text(REMOTE)


def write(folder: Path, qwen: Kind, asked: str = " ".join(MODELS)) -> None:
    """Those that `asked` names, under folder/trl-internal-testing; `qwen`: LONG or SHORT."""
    place = folder / ORGANIZATION
    torch.manual_seed(0)
    for name in (name for name in MODELS if name in asked):
        _save(place, name, qwen)
    _save_remote(place)
    data = place / "zen"
    data.mkdir(parents=True)
    configs = []
    for name, rows in {
        "standard_prompt_only": [{"prompt": p} for p in PROMPTS],
        "conversational_prompt_only": [{"prompt": [{"role": "user", "content": f"{p} ...?"}]} for p in PROMPTS],
    }.items():
        files = []
        for split, part in {"train": rows[:-TEST], "test": rows[-TEST:]}.items():
            path = f"{name}-{split}.jsonl"
            (data / path).write_text("".join(json.dumps(row) + "\n" for row in part))
            files.append({"split": split, "path": path})
        configs.append({"config_name": name, "data_files": files})
    (data / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
