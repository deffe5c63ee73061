"""An export on the Hugging Face hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist.errors import UserError
from mlm_dist.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from huggingface_hub import HfApi

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class Hub:
    """A repository that may be written to.

    Attributes:
        repo: NAME or OWNER/NAME.
        private: whether a new one is to be private; of one that is there nothing changes.
    """

    repo: str
    private: bool = False

    def check(self) -> str:
        """See, before anything expensive, that an upload can succeed; returns the account's name. Raises UserError."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise UserError(f"--push-to-hub: {self.repo!r} must be NAME or OWNER/NAME ({error})") from error
        if not self._token():
            raise UserError(
                "--push-to-hub: no token; put one that may write, from https://huggingface.co/settings/tokens, into the environment as HF_TOKEN"
            )
        if constants.is_offline_mode():
            raise UserError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
        return str(self._asking(lambda api: api.whoami()["name"]))

    def push(self, directory: Path, message: str, *, replaces: "Sequence[str]" = ()) -> str:
        """Make the repository where it is not there, and upload the directory as one commit; returns its address.

        Args:
            replaces: patterns of names of an earlier upload that go with that commit, unless the directory has them.

        Raises:
            UserError: the hub refuses or cannot be reached.
        """

        def send(api: "HfApi") -> str:
            repo = api.create_repo(self.repo, private=self.private, exist_ok=True)
            api.upload_folder(
                repo_id=repo.repo_id, folder_path=directory, commit_message=message, delete_patterns=list(replaces)
            )
            return str(repo)

        return str(self._asking(send))

    def _token(self) -> str:
        """From the environment only: a token on disk may be another person's, or for another purpose. Raises UserError where it can be none."""
        name, token = next(((n, v) for n in TOKENS if (v := os.environ.get(n, "").strip())), ("", ""))
        if not re.fullmatch(r"[!-~]*", token):  # the client would show it in its error
            raise UserError(f"{name}: must be printable ASCII without white space, as the hub gives tokens (not shown)")
        return token

    def _asking(self, question: "Callable[[HfApi], object]") -> object:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        try:
            return question(HfApi(token=self._token()))
        except (HTTPError, OSError) as error:  # the hub's own errors are of one of these kinds
            first = redact(next(iter(str(error).splitlines()), type(error).__name__))
            raise UserError(f"--push-to-hub: {self.repo}: the hub refuses or cannot be reached ({first})") from error
