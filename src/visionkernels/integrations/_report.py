"""What a patch did, for people."""

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """One module that was replaced.

    Args:
        name: the module's qualified name in the model; empty for the model itself.
        class_name: the module's class, with the module that defines it.
        method: the replaced method or attribute.
        function: the only function that was exchanged in `method`; empty where all of it was.
        kind: which part of a vision transformer it is, "attention", "norm" or "MLP"; empty elsewhere.
    """

    name: str
    class_name: str
    method: str
    function: str = ""
    kind: str = ""

    def __str__(self) -> str:
        what = f"{self.class_name.rpartition('.')[2]}.{self.method}"
        return f"{what}: {self.function}" if self.function else what


@dataclass(frozen=True)
class PatchReport:
    """What a call of `patch` did; `len()` counts the modules that it replaced, `str()` is a short table.

    Args:
        model: name of the model's class.
        replaced: the modules replaced by this call.
        already: qualified names of the modules that an earlier call had replaced.
        skipped: qualified names of the modules left alone, because their class, or they themselves, override the
            `forward` that calls the operator.
        unfit: qualified names of the modules left alone for another reason, with the reason.
    """

    model: str
    replaced: tuple[Replaced, ...]
    already: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unfit: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.replaced)

    @property
    def kinds(self) -> dict[str, int]:
        """How many parts of vision transformers were replaced, by kind."""
        found = Counter(one.kind for one in self.replaced)
        return {kind: found[kind] for kind in ("attention", "norm", "MLP") if found[kind]}

    def __str__(self) -> str:
        return self.describe("replaced")

    def describe(self, verb: str) -> str:
        """Return the table, with what was done to the modules in words: "replaced", "would be replaced"."""
        head = f"{self.model}: {_count(len(self), 'module')} {verb}"
        head += f", {len(self.already)} patched before" if self.already else ""
        head += f": {', '.join(_count(number, kind) for kind, number in self.kinds.items())}" if self.kinds else ""
        rows = [(one.name, str(one)) for one in self.replaced if not one.kind]
        rows += [
            (name, f"{what}, {number}x" if number > 1 else what)
            for (name, what), number in Counter(
                (re.sub(r"(?<![^.])\d+(?![^.])", "*", one.name), f"{one}, {one.kind}")
                for one in self.replaced
                if one.kind
            ).items()
        ]
        rows += [(name, "left alone: its forward is overridden") for name in self.skipped]
        rows += [(name, f"left alone: {reason}") for name, reason in self.unfit]
        width = max((len(name or "(model)") for name, _ in rows), default=0)
        lines = [head, *(f"  {name or '(model)':<{width}}  {what}" for name, what in rows)]
        return "\n".join([*lines, *([f"  {_RULE}"] if self.kinds else [])])


_RULE = "attention, norms and MLPs compute no gradients: where one is asked for, upstream's code runs"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
