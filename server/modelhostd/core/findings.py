"""What CheckStorage and fsck can find: the words of ``StorageFinding.kind``."""

import enum


class FindingKind(enum.StrEnum):
    """One kind of difference between the registry and the disk."""

    MISSING_TREE = "missing_tree"
    """The registry says AVAILABLE, and there is no directory. Download again."""
    BROKEN_MANIFEST = "broken_manifest"
    """The manifest is gone or cannot be read. Download again."""
    MISSING_FILE = "missing_file"
    """A file of the manifest is gone. Repaired where the blob is still there."""
    WRONG_SIZE = "wrong_size"
    """A file has another size than its manifest says."""
    CORRUPT_FILE = "corrupt_file"
    """A file's SHA-256 is not the manifest's (deep checks and verify only)."""
    MISSING_BLOB = "missing_blob"
    """A file is there and its blob is not. Repaired by linking the file back."""
    EXTRA_FILE = "extra_file"
    """A model's directory holds a file that its manifest does not name."""
    STRAY_TREE = "stray_tree"
    """A model's directory that the registry does not know. Repaired: moved to quarantine."""
    STRAY_BLOB = "stray_blob"
    """A blob that no model links. Repaired: removed."""
    LEFTOVER_STAGING = "leftover_staging"
    """What an interrupted step left in staging. Repaired: removed. Partial downloads that can still
    be resumed are no finding until they are a week old."""
    DATABASE_BROKEN = "database_broken"
    """The registry cannot be read, or is gone. `modelhostd fsck --rebuild`."""
    DATABASE_VERSION = "database_version"
    """The registry is of another version of modelhostd. An older one is migrated at the next start."""
    BROKEN_EVENT = "broken_event"
    """An event of the log cannot be read. Repaired: the log begins behind it."""
    SEQUENCE_GAP = "sequence_gap"
    """A number is missing in the log of events. Repaired: the log begins behind it."""


DAMAGE = frozenset(
    {
        FindingKind.MISSING_TREE,
        FindingKind.BROKEN_MANIFEST,
        FindingKind.MISSING_FILE,
        FindingKind.WRONG_SIZE,
        FindingKind.CORRUPT_FILE,
    }
)
"""What makes an artifact one that is not whole, where it is not repaired."""
