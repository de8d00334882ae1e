"""The errors that megalm raises for wrong input, one class per kind, each with its own exit code.

A message names the value, the rule and the fix; it is printed once, by one rank, without a traceback.
"""


class MegalmError(Exception):
    """Wrong input or a broken promise of the surroundings; ends the program with `exit_code`."""

    exit_code = 1
    local = False
    """Only one rank has this error, and that rank reports it; else every rank has it, and rank 0 reports."""
    silent = False
    """Another rank has the error and reports it; this one only ends with the same exit code."""
    lasting = False
    """To try the same once more, later, cannot help."""


class ConfigError(MegalmError):
    """A configuration that cannot run; holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            bullets = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in self.problems)
            text = f"{len(self.problems)} problems:\n{bullets}"
        super().__init__(text)


class LayoutError(ConfigError):
    """Ranks that cannot be arranged as asked."""


class DataError(MegalmError):
    """A dataset, corpus or tokenizer that is missing, damaged or does not fit the run."""

    exit_code = 3


class CheckpointError(MegalmError):
    """A checkpoint that is missing, damaged or belongs to another run."""

    exit_code = 4


class WrongStateError(CheckpointError):
    """What a checkpoint would hold is not what is trained."""

    lasting = True


class NonFiniteError(MegalmError):
    """The loss or the gradients are not finite and the run cannot go on."""

    exit_code = 5


class PlatformError(MegalmError):
    """The machine, the launcher or an installed package does not give what the run needs."""

    exit_code = 6
