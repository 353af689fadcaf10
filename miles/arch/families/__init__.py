"""The supported model families. A new one is a module with a `FAMILY` and a line here."""

from __future__ import annotations

from miles.arch.families import (
    deepseek_v3,
    deepseek_v32,
    gemma2,
    gemma3,
    gemma3n,
    glm4_moe,
    llama,
    llama4,
    minimax_m2,
    qwen2,
    qwen3,
    qwen3_moe,
)
from miles.arch.family import Family

_MODULES = (qwen3, qwen3_moe, qwen2, llama, glm4_moe, minimax_m2, gemma2, deepseek_v3, deepseek_v32)

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
FAMILIES |= {family.name: family for family in (*gemma3.FAMILIES, *gemma3n.FAMILIES, *llama4.FAMILIES)}
