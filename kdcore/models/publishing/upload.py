"""Upload of a finished folder to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from kdcore.errors import UserError, first_line

CARD = "README.md"
UPLOADED = ("*.json", "*.jinja", "*.md", "*.model", "*.safetensors", "*.txt")
"""Names of the files that are uploaded: weights as safetensors, and what loads them."""


_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]
"""What a failed connection raises: huggingface_hub depends on httpx or, later, on httpx2."""


def upload(folder: Path, repo: str, *, public: bool = False, message: str = "") -> str:
    """Upload the folder of a model, an adapter or a drafter, with its card.

    Args:
        folder: A folder with safetensors weights and a README.md.
        repo: Repository on the hub, ``owner/name``; a new one is created.
        public: Whether a new repository is public.
        message: Message of the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: The folder lacks weights or a card, no token is stored, or the hub refuses.
    """
    if not sorted(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} does not contain safetensors weights",
            "name a folder of weights, e.g. model/, adapter/ or drafter/ of a run",
        )
    if not (folder / CARD).is_file():
        raise UserError(
            f"{folder} does not contain a model card ({CARD})",
            f"write {folder / CARD}: what the model is, its data and licence, and its figures",
        )
    if get_token() is None:
        raise UserError(
            "no token of the hub is stored on this machine",
            "log in (hf auth login), or set HF_TOKEN to a token with write access",
        )
    api = HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            allow_patterns=[*UPLOADED],
            commit_message=message or f"Upload {folder.name}",
        )
    except HFValidationError as wrong:
        raise UserError(f"'{repo}' is not a repository", "name it OWNER/NAME") from wrong
    except OfflineModeIsEnabled as offline:
        raise UserError(
            "the hub cannot be reached: HF_HUB_OFFLINE is set", "run: unset HF_HUB_OFFLINE"
        ) from offline
    except _HTTP_ERROR as refusal:
        raise UserError(
            f"the hub refused the upload to {repo}: {first_line(refusal)}",
            "check the network, the name, and that the token may write to it",
        ) from refusal
    except (ValueError, KeyError) as answer:  # of another server than the hub, or a proxy
        raise UserError(
            f"the hub's answer cannot be read: {first_line(answer)}",
            "check HF_ENDPOINT, and look at the repository: the upload may be complete",
        ) from answer
    return str(address)
