"""What the doctor raises on purpose."""

from contig_pass.errors import ContigPassError


class DoctorError(ContigPassError):
    """The doctor cannot examine what it was asked to."""
