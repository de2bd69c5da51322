"""Report of `lit-align doctor`: sections of lines, errors with their remedies, and advice."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

SEE_BELOW = "error, see below"


@dataclass
class Diagnosis:
    """Collects the results of checks, section by section; a failing check stops no other."""

    sections: dict[str, list[str]] = field(default_factory=dict)  # lines by title
    errors: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def check(self, title: str, check: Callable[[], Iterable[str] | None]) -> None:
        """Append the lines of a check to a section; an exception becomes an error of that section."""
        lines = self.sections.setdefault(title, [])
        try:
            for line in check() or ():
                lines.append(line)  # one by one: lines before an exception are kept
        except Exception as error:  # any exception would also stop the run
            self.fail(title, error)

    def fail(self, title: str, error: Exception) -> None:
        """Note an error of a section, once."""
        lines, text = self.sections.setdefault(title, []), f"{title}: {describe(error)}"
        if text in self.errors:
            return
        self.errors.append(text)
        if SEE_BELOW not in lines:
            lines.append(SEE_BELOW)

    def text(self) -> str:
        """Format the report."""
        parts = [f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in self.sections.items()]
        if self.errors:
            parts.append("errors\n" + "\n".join(f"  - {error}" for error in self.errors))
        if self.advice:
            parts.append("what to change\n" + "\n".join(f"  - {advice}" for advice in self.advice))
        count = len(self.errors)
        parts.append(f"{count} error{'s' * (count > 1)}: fit would not run" if count else "no errors: fit would start")
        return "\n".join(parts)


def describe(error: Exception) -> str:
    """Format an error in one line, with its class where the message alone is unclear."""
    plain = isinstance(error, ValueError | OSError | MemoryError) and str(error)
    text = str(error) if plain else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
