"""Facts as people read them: titled lists, numbers and durations."""


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def summary(title: str, rows: list[tuple[str, str]]) -> str:
    """A titled list of facts, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def count(number: float) -> str:
    """A number as people say it: 12.6M, 1.3B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:g}"


def gigabytes(size: float) -> str:
    """Bytes as GB or MB (powers of ten)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
