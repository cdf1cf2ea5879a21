"""What HELM must know of a model under a setting, told to its registries and to its configuration files.

Knows names, context lengths and special tokens; must not know weights. The files matter because `helm-summarize` and
`helm-run` are processes of their own and read nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from helm.benchmark.config_registry import (
    MODEL_DEPLOYMENTS_FILE,
    MODEL_METADATA_FILE,
    TOKENIZER_CONFIGS_FILE,
    register_builtin_configs_from_helm_package,
)
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.model_metadata_registry import (
    FULL_FUNCTIONALITY_TEXT_MODEL_TAG,
    INSTRUCTION_FOLLOWING_MODEL_TAG,
    TEXT_MODEL_TAG,
    ModelMetadata,
    register_model_metadata,
)
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
from helm.common.general import asdict_without_nones

from flexeval.benchmark.helm.replacing import replaced
from flexeval.errors import ConfigError
from flexeval.files import write_text
from flexeval.tokenizer import open_tokenizer

CLIENT_CLASS = "flexeval.helm_plugin.FlexevalClient"
"""What stock `helm-run` instantiates for our deployments."""
_TOKENIZER_CLASS = "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model under a setting, as HELM sees it."""

    name: str
    """HELM's name of the model without a setting, `creator/model`: `flexeval/smollm2-135m-instruct`."""
    model: str
    """What `Engine.load` takes for it; written down so that `helm-run` can load it."""
    setting: str
    """The setting's name: `none`, `w4`."""
    tokenizer_dir: Path
    """Folder of the Hugging Face tokenizer."""
    max_sequence_length: int
    """Context of the model in tokens, special tokens included."""
    note: str = ""
    """What one should know about the weights, for HELM's pages."""
    num_template_tokens: int = 0
    """Tokens of a chat template around each prompt that is answered; 0 where none is applied."""
    is_instruct: bool = False
    """Whether run entries shall add HELM's instructions for instruction-following models."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r} cannot be a model's name in HELM", mend="Use the form creator/model, with - for spaces"
            )

    @property
    def deployment(self) -> str:
        """HELM's name of both the model and the deployment: it holds the setting, so that runs never collide."""
        return self.name if self.setting == "none" else f"{self.name}-{self.setting}"


class SpecialTokens(NamedTuple):
    """The tokens that are not text."""

    end_of_text: str
    """What the model generates when it is done."""
    prefix: str
    """What stands before a document that is scored from its first token."""
    added_prefix: str
    """What the tokenizer itself puts before a prompt; empty if nothing."""
    num_added: int
    """Tokens that the tokenizer adds to a prompt."""


def read_special_tokens(tokenizer_dir: Path) -> SpecialTokens:
    """Read them from a tokenizer's folder.

    Raises:
        ConfigError: The tokenizer names no end-of-text token.
        ModelError: It cannot be read.
    """
    tokenizer = open_tokenizer(tokenizer_dir)
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end-of-text token", where=str(tokenizer_dir), mend="Set eos_token")
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    before = full[: full.index(plain[0])]
    return SpecialTokens(
        end_of_text=tokenizer.eos_token,
        prefix=tokenizer.bos_token or tokenizer.eos_token,
        added_prefix=str(tokenizer.decode(before)),
        num_added=len(full) - len(plain),
    )


def register(card: ModelCard, local: Path) -> SpecialTokens:
    """Make the model known to HELM in this process, and to later ones through the files in `local`."""
    register_builtin_models()
    special = read_special_tokens(card.tokenizer_dir)
    title = card.name.split("/")[1] + ("" if card.setting == "none" else f" ({card.setting})")
    metadata = ModelMetadata(
        name=card.deployment,
        creator_organization_name="flexeval",
        display_name=title,
        description=f"{card.model}, setting {card.setting}. {card.note}".strip(),
        access="open",
        release_date=None,
        tags=[
            TEXT_MODEL_TAG,
            FULL_FUNCTIONALITY_TEXT_MODEL_TAG,
            *([INSTRUCTION_FOLLOWING_MODEL_TAG] if card.is_instruct else []),
        ],
    )
    tokenizer = TokenizerConfig(
        name=card.name,
        tokenizer_spec=TokenizerSpec(_TOKENIZER_CLASS, {"pretrained_model_name_or_path": str(card.tokenizer_dir)}),
        end_of_text_token=special.end_of_text,
        prefix_token=special.prefix,
    )
    # the engine adds these tokens to what HELM sends
    room = card.max_sequence_length - max(special.num_added, card.num_template_tokens)
    deployment = ModelDeployment(
        name=card.deployment,
        model_name=card.deployment,
        tokenizer_name=card.name,
        max_request_length=room,
        max_sequence_length=room - 1,  # HELM's for a document to be scored: it writes the prefix token before it
        client_spec=ClientSpec(
            CLIENT_CLASS,
            {
                "model": card.model,
                "setting": card.setting,
                "added_prefix": special.added_prefix,
                "apply_chat_template": card.num_template_tokens > 0,
            },
        ),
    )
    _record(local / MODEL_METADATA_FILE, "models", asdict_without_nones(metadata))
    _record(local / TOKENIZER_CONFIGS_FILE, "tokenizer_configs", asdict_without_nones(tokenizer))
    _record(local / MODEL_DEPLOYMENTS_FILE, "model_deployments", asdict_without_nones(deployment))
    register_model_metadata(metadata)  # metadata first: a deployment looks its model up
    register_tokenizer_config(tokenizer)
    register_model_deployment(deployment)
    return special


@cache
def register_builtin_models() -> None:
    """Make the models that HELM knows known, once."""
    # Its files are long: libyaml reads them in a tenth of the time.
    with replaced((yaml.safe_load, _load_yaml)):
        register_builtin_configs_from_helm_package()


def _load_yaml(stream: Any) -> Any:
    return yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _record(path: Path, key: str, item: Mapping[str, Any]) -> None:
    """Write `item` into a list of named items, in place of the one of the same name."""
    items = yaml.safe_load(path.read_text(encoding="utf-8"))[key] if path.is_file() else []
    others = [other for other in items if other["name"] != item["name"]]
    write_text(path, yaml.safe_dump({key: [*others, dict(item)]}, sort_keys=False, allow_unicode=True))
