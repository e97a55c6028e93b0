"""What can go wrong with corpora, traces and their collection; each error carries its exit code."""


class CollectError(ValueError):
    """Root of every error this package raises on purpose. `exit_code` is what a command
    ends with.
    """

    exit_code = 1


class SettingsError(CollectError):
    """A setting is out of range or contradicts another."""

    exit_code = 2


class UnknownDatasetError(SettingsError):
    """A data set name that nothing is known by; the message lists the known ones."""


class CorpusError(CollectError):
    """Text that cannot be used: missing, empty, binary, not UTF-8, or too little of it."""

    exit_code = 3


class HubError(CorpusError):
    """The hub cannot be reached or refuses; the message names the way without it."""


class NoRoutersError(CollectError):
    """The model routes nothing (it is dense), or its routers speak in a way that is not
    understood.
    """

    exit_code = 3


class TraceError(CollectError):
    """A trace folder is missing, unfinished, of another schema or of another model."""

    exit_code = 3


class CorruptShardError(TraceError):
    """One shard is damaged; the message names the file and what is wrong with it."""


class ResumeError(TraceError):
    """What is asked for differs from what the folder was begun with; the message names each
    difference.
    """


class DirectoryInUseError(CollectError):
    """Another collector holds the folder's lock."""


class OutOfSpaceError(CollectError):
    """The disk is full or the folder refuses writing; finished shards are kept."""


class OutOfMemoryError(CollectError):
    """Not even one sample fits into the device's memory."""

    exit_code = 4
