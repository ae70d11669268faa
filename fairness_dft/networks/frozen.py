"""The base of everything that loads frozen weights: find them, check them, load them once, never train them.

A subclass names what it needs in class attributes and implements `_load`; finding, checking, freezing and the text of
the error are here:

    load once       `load` calls `_load` and freezes; a second call does nothing
    never train     `train()` stays in evaluation mode, and no parameter requires a gradient
    find            `find`: a local path, a path beside the package, or the Hugging Face hub
    check           `check` looks for the files; it downloads nothing, loads nothing and changes no state
    fail            `loading_error`: what could not be loaded, why, what is allowed, and another way to go on
"""

from typing import ClassVar

from torch import nn
from typing_extensions import Self, override

from fairness_dft.files import Location, locate, one_line

MINIATURE = "run on the miniature with --config experiments/parts/portraits.yaml"
MAX_REASON = 300  # characters of another library's message that an error quotes


def loading_error(what: str, path: str, reason: object, allowed: str, way_out: str = "") -> ValueError:
    """Return the one error for a network or file that cannot be loaded, in one line.

    Args:
        what: What it is, such as "classifier".
        path: Its path, as the user gave it.
        reason: Why it could not be loaded: a message, or the error of another library.
        allowed: What a path may be.
        way_out: What the user can do instead.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> print(loading_error("classifier", "x", "there is no file 'config.json'", "a local folder"))
        the classifier 'x' could not be loaded (there is no file 'config.json'): give a local folder
    """
    cause = type(reason).__name__ if isinstance(reason, Exception) else "unknown reason"
    text = " ".join(str(reason).split())[:MAX_REASON].rstrip(". ") or cause
    return ValueError(f"the {what} {path!r} could not be loaded ({text}): give {allowed}{way_out and ', or '}{way_out}")


class FrozenWeights:
    """Weights that are loaded once and never change; networks in PyTorch derive from `FrozenNetwork`.

    Attributes:
        path: Where the weights are, as the user gave it; empty for what needs nothing from outside.
        what: What errors call it.
        allowed: What a path may be, for errors.
        way_out: What the user can do instead, for errors.
        required_files: Files that the folder, or the repository on the hub, must hold.
        single_file: Whether `path` is a file instead of a folder: local, or owner/repository/file on the hub.
        local_only: Whether `path` must be on this machine.
    """

    path: str = ""
    what: ClassVar[str] = "network"
    allowed: ClassVar[str] = "a local folder, or an id of the Hugging Face hub where it can be reached"
    way_out: ClassVar[str] = MINIATURE
    required_files: ClassVar[tuple[str, ...]] = ()
    single_file: ClassVar[bool] = False
    local_only: ClassVar[bool] = False
    _loaded = False

    def load(self) -> None:
        """Load the weights and freeze them; a second call does nothing.

        Raises:
            ValueError: If the weights cannot be found or loaded.
        """
        if self._loaded:
            return
        location = self.find()
        try:
            self._load(location)
        except Exception as error:  # each library and file format raises its own
            raise self.error(error if location.reachable else f"{location.missing}; {one_line(error)}") from error
        self._loaded = True

    def check(self) -> None:
        """Refuse weights that cannot be found; load nothing, download nothing and change no state.

        Raises:
            ValueError: If they cannot be found.
        """
        self.find()

    def find(self) -> Location:
        """Return where the weights are, without loading or downloading them.

        Raises:
            ValueError: If a required file is in none of the places where it may be.
        """
        if not self.path:
            return Location("", None, True)
        location = locate(self.path, single_file=self.single_file, local_only=self.local_only)
        for name in (location.name,) if self.single_file else self.required_files:
            if not location.holds(name):
                raise self.error(f"there is no file {name!r}" if location.reachable and name else location.missing)
        return location

    def error(self, reason: object) -> ValueError:
        """Return the error that says why these weights cannot be loaded.

        Args:
            reason: A message, or the error of another library.
        """
        return loading_error(self.what, self.path, reason, self.allowed, self.way_out)

    def _load(self, location: Location) -> None:
        """Load the weights; whatever it raises becomes the one error.

        Args:
            location: Where they are.
        """


class FrozenNetwork(FrozenWeights, nn.Module):
    """A frozen network: loaded once, never trained.

    Example:
        >>> from fairness_dft.features import Dino
        >>> network = Dino("data/portraits/dino")
        >>> network.check()  # looks for the files, and loads nothing
        >>> network.load()
        >>> network.train().training, any(p.requires_grad for p in network.parameters())
        (False, False)
    """

    @override
    def load(self) -> None:
        super().load()
        self.requires_grad_(False).eval()

    @override
    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode.

        Args:
            mode: Ignored: a frozen network has no dropout to switch on and no statistics to update.
        """
        return super().train(False)
