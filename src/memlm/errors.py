"""What can go wrong, each as a type that a program can catch and one line that a person can act on."""


class MemlmError(Exception):
    """Base of every error memlm raises on purpose.

    The message is one line: which field or file, its value, what to do. The command line prints it and exits with 2.
    """


class ConfigError(MemlmError, ValueError):
    """A setting is unknown, of the wrong type, or outside its range."""


class InputError(MemlmError, ValueError):
    """The user's documents or token ids cannot be used as they are."""


class ArtifactError(MemlmError):
    """A stage's folder is missing, damaged, of another version, or does not match what it is used with."""


class OutputExistsError(ArtifactError):
    """The output folder exists and is not a resumable part of this run."""


class OutputBusyError(OutputExistsError):
    """Another process writes the output folder."""


class ModelError(MemlmError):
    """A model or tokenizer cannot be reached, or lacks what is needed."""


class TokenizerMismatchError(ModelError):
    """Two parts that must share a tokenizer do not."""


class TrainingError(MemlmError):
    """Training cannot go on, such as after an overflow or a NaN."""


def reason_of(error: BaseException) -> str:
    """The first line of what a library says, with the next where it only announces that, or the error's type."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {others[0].strip()}" if others and first.endswith(":") else first)[:300]
