"""What is said of a sink that fails."""

import traceback

from megalm.storage.faults import reason_of, system_fault


def failure_of(name: str, error: Exception) -> str:
    """One line for what the system refused; of a fault in a sink's own code the traceback too."""
    fault = system_fault(error)
    if fault is None:
        return f"{name} failed ({error!r}):\n{''.join(traceback.format_exception(error))}"
    where = f" cannot write {fault.filename}" if fault.filename else " cannot write"
    return f"{name}{where}: {reason_of(fault, fault.filename or '.')}"
