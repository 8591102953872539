"""What a patch did, for people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """One module that was replaced.

    Args:
        name: the module's qualified name in the model; empty for the model itself.
        class_name: the module's class, with the module that defines it.
        method: the replaced method or attribute.
        function: the only function that was exchanged in `method`; empty where all of it was.
    """

    name: str
    class_name: str
    method: str
    function: str = ""

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
    """

    model: str
    replaced: tuple[Replaced, ...]
    already: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        return self.describe("replaced")

    def describe(self, verb: str) -> str:
        """Return the table, with what was done to the modules in words: "replaced", "would be replaced"."""
        head = f"{self.model}: {len(self)} module{'' if len(self) == 1 else 's'} {verb}"
        head += f", {len(self.already)} patched before" if self.already else ""
        rows = [(one.name, str(one)) for one in self.replaced]
        rows += [(name, "left alone: its forward is overridden") for name in self.skipped]
        width = max((len(name or "(model)") for name, _ in rows), default=0)
        return "\n".join([head, *(f"  {name or '(model)':<{width}}  {what}" for name, what in rows)])
