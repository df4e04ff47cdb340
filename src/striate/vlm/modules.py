"""The weight matrices of a decoder layer by role: attention and MLP, and the parts of both, in any family.

The role follows from a parameter's name within its layer. Fused matrices have one role each and train as a whole:
`qkv_proj` is `qkv`, `gate_up_proj` is `gate_up`. Experts, shared ones too, are MLPs; their router has no role. Norms,
convolutions and other weights that are not matrices have none either: they train with `all` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from striate.errors import UserError, nearest

ALL = "all"
# The roles behind each word of `--modules`. "attention gate": matrices of attention beside q, k, v and the output.
MODULES = {
    "attention": frozenset({"qkv", "o", "attention gate"}),
    "mlp": frozenset({"gate_up", "down"}),
    "gate_up": frozenset({"gate_up"}),
    "down": frozenset({"down"}),
    "qkv": frozenset({"qkv"}),
    "o": frozenset({"o"}),
}

# Modules that mix tokens: attention of every kind, and the convolutions that take its place in some layers.
_MIXER = re.compile(r"(^|\.)(self_attn|cross_attn|linear_attn|attention|conv)\.")
_NO_MATRIX = re.compile(r"norm|indexer")


def _ends_with(*names: str) -> re.Pattern[str]:
    return re.compile(rf"(^|\.)({'|'.join(names)})$")


_QKV = _ends_with(
    "[qkv]_proj", "qkv_proj", "query_key_value", r"self\.(query|key|value)",
    "q_[ab]_proj", "kv_a_proj_with_mqa", "kv_b_proj",  # of low rank: DeepSeek
    "in_proj_qkv",  # linear attention: Qwen
)  # fmt: skip
_OUTPUT = _ends_with("o_proj", "out_proj", "dense")
_GATE = _ends_with(r"\w+_proj", r"in_proj_\w+")
_GATE_UP = _ends_with("gate_proj", "up_proj", "gate_up_proj", "fc1", "w[13]", "dense_h_to_4h", r"intermediate\.dense")
_DOWN = _ends_with("down_proj", "fc2", "w2", "dense_4h_to_h", r"output\.dense")
_IN_MIXER = (("qkv", _QKV), ("o", _OUTPUT), ("attention gate", _GATE))
_ELSEWHERE = (("gate_up", _GATE_UP), ("down", _DOWN), ("qkv", _QKV), ("o", _OUTPUT))


def parse_modules(text: str) -> str:
    """The canonical form of `--modules`: "all", or words of `MODULES` in their order, separated by commas.

    Raises:
        UserError: a word is unknown, or there is none.
    """
    words = {word.strip() for word in text.split(",") if word.strip()}
    for word in sorted(words - {ALL, *MODULES}):
        raise UserError(f"--modules {nearest(word, (ALL, *MODULES))}", see="modules")
    if not words:
        raise UserError(f"--modules is empty; expected all, or some of {', '.join(MODULES)}", see="modules")
    return ALL if ALL in words else ",".join(word for word in MODULES if word in words)


def role_of(name: str) -> str | None:
    """The role of a parameter by its name within a decoder layer (mlp.up_proj.weight); None for one without."""
    module = re.sub(r"(\.weight|\.bias|_bias)$", "", name)
    if _NO_MATRIX.search(module):
        return None
    roles = _IN_MIXER if _MIXER.search(module) else _ELSEWHERE
    return next((role for role, pattern in roles if pattern.search(module)), None)


def choose_names(names: Iterable[str], modules: str) -> tuple[str, ...]:
    """The names, within a decoder layer, of parameters or linear modules that belong to `modules` (canonical)."""
    if modules == ALL:
        return tuple(names)
    roles = frozenset().union(*(MODULES[word] for word in modules.split(",")))
    return tuple(name for name in names if role_of(name) in roles)


def check_present(names: Iterable[str], modules: str, kind: str) -> None:
    """Refuse modules that none of the chosen layers has; `names` are those of all parameters, within their layers.

    Raises:
        UserError: names the modules that these layers have.
    """
    roles = {role_of(name) for name in names}
    present = [word for word, own in MODULES.items() if own & roles]
    for word in modules.split(",") if modules != ALL else ():
        if word not in present:
            raise UserError(
                f"--modules {word}: these layers of {kind} have no such matrices; they have {', '.join(present)}",
                see="modules",
            )
