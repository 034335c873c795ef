"""Chat templates by name, for tokenizers without one: the formats that models were trained on, written anew.

Each marks what the assistant says with {% generation %}, so that the loss falls on that and the token that ends the turn.
"""

from collections.abc import Mapping
from types import MappingProxyType


def _roles(before: str, after: str, *, names: Mapping[str, str] = MappingProxyType({}), start: str = "{{ bos_token }}") -> str:
    """Every turn alike: `before` (with ROLE for the role's name), the content, `after`."""
    named = "{% set names = " + str({**names}) + " %}" if names else ""
    name = "names.get(m['role'], m['role'])" if names else "m['role']"
    head = "{{ '" + before.replace("ROLE", "' + " + name + " + '") + "' }}"
    reply = "{{ '" + before.replace("ROLE", names.get("assistant", "assistant")) + "' }}"
    say = "{{ m['content'] | trim + '" + after + "' }}"
    return (
        start + named + "{% for m in messages %}" + head + "{% if m['role'] == 'assistant' %}{% generation %}" + say + "{% endgeneration %}"
        "{% else %}" + say + "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}" + reply + "{% endif %}"
    )  # fmt: skip


def _first_system(turn: str, reply: str, *, start: str = "{{ bos_token }}") -> str:
    """For formats without a system turn: what it says stands before the first user's words, as `system`."""
    return (
        start + "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] | trim %}"
        "{% elif m['role'] == 'assistant' %}" + reply + "{% else %}" + turn + "{% set ns.system = '' %}{% endif %}{% endfor %}"
    )


TEMPLATES: dict[str, str] = {
    "chatml": _roles("<|im_start|>ROLE\\n", "<|im_end|>", start=""),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "llama2": _first_system(
        "{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' if ns.system else '') }}"
        "{{ m['content'] | trim + ' [/INST]' }}",
        "{% generation %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endgeneration %}",
        start="",
    ),
    "mistral": _first_system(
        "{{ '[INST] ' + (ns.system + '\\n\\n' if ns.system else '') + m['content'] | trim + ' [/INST]' }}",
        "{% generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}",
    ),
    "gemma": _first_system(
        "{{ '<start_of_turn>user\\n' + (ns.system + '\\n\\n' if ns.system else '') + m['content'] | trim + '<end_of_turn>\\n' }}",
        "{{ '<start_of_turn>model\\n' }}{% generation %}{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}",
    )
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "phi3": _roles("<|ROLE|>\\n", "<|end|>", start=""),
    "zephyr": _roles("<|ROLE|>\\n", "' + eos_token + '", start=""),
    "vicuna": _first_system(
        "{{ (ns.system + ' ' if ns.system else '') + 'USER: ' + m['content'] | trim + ' ASSISTANT:' }}",
        "{% generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}",
    ),
    "alpaca": _first_system(
        "{{ (ns.system or 'Below is an instruction that describes a task. Write a response that appropriately completes the request.')"
        " + '\\n\\n' if loop.index0 < 2 else '' }}{{ '### Instruction:\\n' + m['content'] | trim + '\\n\\n### Response:\\n' }}",
        "{% generation %}{{ m['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n\\n' }}",
    ),
    "plain": _roles("### ROLE\\n", "' + eos_token + '", start=""),
}
"""Name: Jinja. `plain` needs no special tokens but the tokenizer's own end of text."""

OTHER_NAMES = {
    "qwen": "chatml", "qwen2": "chatml", "qwen2.5": "chatml", "qwen_25": "chatml", "qwen3": "chatml", "qwen3_nothink": "chatml",
    "qwen_2_5": "chatml", "inst": "mistral", "mistral_v1": "mistral", "mistral_v2v3": "mistral", "gemma2": "gemma", "gemma3": "gemma",
    "gemma_3": "gemma", "phi": "phi3", "phi_3": "phi3", "phi_35": "phi3", "llama3.1": "llama3", "llama3.2": "llama3", "llama3_x": "llama3",
    "llama_3": "llama3", "default": "plain",
}  # fmt: skip
"""What other tools call them."""


def template_named(name: str) -> str | None:
    """Our name of a template that other tools know by this one."""
    name = OTHER_NAMES.get(name, name)
    return name if name in TEMPLATES else None
