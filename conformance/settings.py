"""How a model is trained: one frozen `Setting`, its tokens, and where each applies.

The grammar is fixed, since setting ids are public: the tokens of the dimensions below, in this
order, joined by `+`; a dimension at its default has no token; the default setting is `-`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

DEFAULT_ID = "-"

# dimension -> {value: token}; the first value is the default and has no token.
DIMENSIONS: dict[str, dict[str, str]] = {
    "dtype": {"float32": "", "bfloat16": "bf16", "float64": "fp64"},
    "tuning": {"full": "", "lora": "lora", "lora-experts": "lora-experts", "qlora": "qlora"},
    "checkpointing": {
        "off": "",
        "nonreentrant": "ckpt-nonreentrant",
        "reentrant": "ckpt-reentrant",
    },
    "batch": {"text": "", "padded": "padded", "packed": "packed", "images": "images"},
    "offload": {
        "off": "",
        "on": "offload",
        "legacy": "offload-legacy",
        "disk": "offload-disk",
        "hidden_states": "offload-hidden_states",
    },
    "kernels": {"off": "", "on": "kernels"},
    "accumulation": {"off": "", "on": "accum"},
}

# A value needs these traits of the model; every other value applies everywhere.
NEEDS_TRAITS: dict[tuple[str, str], frozenset[str]] = {
    ("tuning", "lora-experts"): frozenset({"moe"}),
    ("batch", "images"): frozenset({"vision"}),
}


@dataclass(frozen=True)
class Setting:
    """One combination of training choices; the field names are the dimensions of `DIMENSIONS`."""

    dtype: str = "float32"
    tuning: str = "full"
    checkpointing: str = "off"
    batch: str = "text"
    offload: str = "off"
    kernels: str = "off"
    accumulation: str = "off"

    def __post_init__(self) -> None:
        for name, values in DIMENSIONS.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"setting: {name} is {getattr(self, name)!r}; it is one of {', '.join(values)}"
                )

    @property
    def id(self) -> str:
        """The setting's public id, such as `lora+ckpt-nonreentrant+packed`."""
        return "+".join(self.tokens) or DEFAULT_ID

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the non-default dimensions, in the fixed order."""
        found = (DIMENSIONS[f.name][getattr(self, f.name)] for f in fields(self))
        return tuple(token for token in found if token)

    @property
    def dimensions(self) -> frozenset[str]:
        """The dimensions that differ from the default."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting of an id; ValueError names the first token that is unknown or misplaced."""
        chosen: dict[str, str] = {}
        tokens = {} if text in ("", DEFAULT_ID) else dict.fromkeys(text.split("+"))
        for token in tokens:
            for name, values in DIMENSIONS.items():
                match = [value for value, spelt in values.items() if spelt and spelt == token]
                if match:
                    if name in chosen:
                        raise ValueError(f"setting {text!r}: two values for {name}")
                    chosen[name] = match[0]
                    break
            else:
                known = ", ".join(t for v in DIMENSIONS.values() for t in v.values() if t)
                raise ValueError(f"setting {text!r}: unknown token {token!r}; tokens are {known}")
        setting = cls(**chosen)
        if tokens and setting.id != text:
            raise ValueError(f"setting {text!r}: tokens out of order; write {setting.id!r}")
        return setting

    def but(self, **changes: str) -> Setting:
        """This setting with some dimensions changed."""
        return replace(self, **changes)

    def applies_to(self, traits: frozenset[str]) -> bool:
        """Whether a model with these traits can be trained so."""
        return all(
            traits >= needed
            for (name, value), needed in NEEDS_TRAITS.items()
            if getattr(self, name) == value
        )
