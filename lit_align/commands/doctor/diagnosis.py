"""What `lit-align doctor` has found: sections of lines, errors with their remedies, and what it would change."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SEE_BELOW = "error, see below"


@dataclass
class Diagnosis:
    """Grows section by section; what fails in one is an error and stops nothing that comes after.

    A section can be opened again, so that what stands on its own in it fails on its own.
    """

    sections: dict[str, list[str]] = field(default_factory=dict)  # lines by title
    errors: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @contextmanager
    def section(self, title: str) -> Iterator[list[str]]:
        """A context for a section's lines; what is raised in it is noted."""
        lines = self.sections.setdefault(title, [])
        try:
            yield lines
        except Exception as error:  # whatever would stop a run is to be told, not to stop the report
            self.fail(title, error)

    def fail(self, title: str, error: Exception) -> None:
        """Note an error of a section; the same one a second time changes nothing."""
        lines, told = self.sections.setdefault(title, []), f"{title}: {describe(error)}"
        if told in self.errors:
            return
        self.errors.append(told)
        if SEE_BELOW not in lines:
            lines.append(SEE_BELOW)

    def text(self) -> str:
        """The report."""
        parts = [f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in self.sections.items()]
        if self.errors:
            parts.append("errors\n" + "\n".join(f"  - {error}" for error in self.errors))
        if self.advice:
            parts.append("what to change\n" + "\n".join(f"  - {advice}" for advice in self.advice))
        count = len(self.errors)
        parts.append(f"{count} error{'s' * (count > 1)}: fit would not run" if count else "no errors: fit would start")
        return "\n".join(parts)


def describe(error: Exception) -> str:
    """An error in a few words; the kind of it where its message would not say what it is."""
    plain = isinstance(error, ValueError | OSError | MemoryError) and str(error)
    text = str(error) if plain else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def gigabytes(count: int) -> str:
    """Bytes as a person reads them, in 10^9 or 10^6."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
