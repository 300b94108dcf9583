"""Every error that contig_pass raises on purpose."""


class ContigPassError(RuntimeError):
    """Base of all errors below; the message is one line that says what would be right."""


class OptionError(ContigPassError):
    """An option of ``torch.compile(..., backend="contig_safe")`` is unknown or has a bad value."""


class ContractError(ContigPassError):
    """A contract that cannot be registered, or a request for one that does not exist."""


class LayoutViolation(ContigPassError):
    """A use that breaks its contract: under policy ``strict`` one that can be neither proved nor
    repaired, under :func:`contig_pass.sanitize` one that is about to happen."""


class TargetError(ContigPassError):
    """What ``contig-pass diff`` was told to trace does not exist, or cannot be traced."""


class ReportError(ContigPassError):
    """A report cannot be written where it was asked for, or read back."""


class InductorHookError(ContigPassError):
    """A private Inductor hook that contig_pass needs is missing from this version of torch."""
