"""What a row of the table of integrations says; each file of this package holds the rows of one upstream project."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One upstream code base, or one model of it, for people.

    Args:
        upstream: the project, and the model where it has several.
        versions: the upstream versions that it is tested with.
        replaces: what is replaced, as upstream calls it.
        switch_on: the line that switches it on.
    """

    upstream: str
    versions: str
    replaces: str
    switch_on: str
