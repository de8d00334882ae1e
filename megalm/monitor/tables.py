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
    """A number as people say it, in three figures: 12.6M, 1.3B, 11.2P."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # 999,500 and more round to a million
            shown = number / size
            return f"{shown:,.0f}{suffix}" if abs(shown) >= 999.5 else f"{shown:.3g}{suffix}"
    return f"{number:.3g}" if isinstance(number, float) else f"{number:g}"


def gigabytes(size: float) -> str:
    """Bytes as GB or MB (powers of ten)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def columns(rows: list[tuple[str, ...]], right: int = 0) -> str:
    """Rows of a table, the first of them its head; the first `right` columns end together."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            f"{cell:>{width}}" if number < right else f"{cell:<{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def age(seconds: float) -> str:
    """How long ago, in one unit: 40 s, 12 min, 5 h, 3 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
