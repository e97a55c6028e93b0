"""What can go wrong with a predictor's files, training data and options."""


class PredictorError(ValueError):
    """A predictor cannot be read, or was trained for another model; names file, field, difference.

    `exit_code` is what a command ends with.
    """

    exit_code = 3


class TrainingDataError(PredictorError):
    """Traces lack what a family learns from; the message says how to record it."""


class SettingsError(PredictorError):
    """An option of training is unknown, out of range or contradicts another."""

    exit_code = 2


class FolderError(PredictorError):
    """The output folder is in use or holds another predictor, or cannot be written."""

    exit_code = 1
