"""Small chat templates of the kinds that models have, and byte-level tokenizers for them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

USERS = "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = "
    "loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}" + USERS + "{% else %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content or "
    "(m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '') %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') "
    "}}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
)
"""Writes a think block before the last answer only; it is empty if there is no reasoning."""
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
"""Opens a think block in the prompt, and writes answers without one."""
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
    "\n{{ m.content }}",
    "\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ "
    "m.content }}",
)
"""Opens a think block in the prompt, and writes answers with one."""
NO_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
"""Writes a closed think block in the prompt, and answers without one."""
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
"""Ends each turn with one token, and the conversation with the end of sequence."""
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content "
    "}} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
"""Writes a space before and after an answer."""
HARMONY = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}"
    "<|start|>assistant<|channel|>{% if m.thinking %}analysis<|message|>{{ m.thinking "
    "}}<|end|><|start|>assistant"
    "<|channel|>{% endif %}final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% "
    "endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""gpt-oss: channels, of special tokens."""
TEXT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} [END]\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Ends a turn with a text that is not a single token."""
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Writes nothing after an answer that could end it."""
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor "
    "%}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls "
    "%}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor "
    "%}"
    "<|im_end|>\n{% endfor %}" + ASK
)
"""Writes tools and tool calls."""

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|User|>", "<|Assistant|>", "<|user|>", "<|assistant|>",
    "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
)  # fmt: skip


def chat_tokenizer(
    template: str | None, *, eos: str = "<|endoftext|>", plain: tuple[str, ...] = ("<think>", "</think>")
) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer with the special tokens of all templates of this module.

    Args:
        template: the chat template.
        eos: its end of sequence.
        plain: added tokens that are not special, so that decoding keeps them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    tokenizer.chat_template = template
    return tokenizer
