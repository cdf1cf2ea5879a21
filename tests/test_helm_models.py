"""What HELM learns of a model: in this process, and from the files that its tools read."""

from pathlib import Path

import pytest
import yaml
from helm.benchmark.config_registry import register_configs_from_directory
from helm.benchmark.model_deployment_registry import get_default_model_deployment_for_model, get_model_deployment
from helm.benchmark.model_metadata_registry import (
    INSTRUCTION_FOLLOWING_MODEL_TAG,
    get_model_metadata,
    model_has_tag,
)
from helm.benchmark.tokenizer_config_registry import get_tokenizer_config
from helm.common.object_spec import get_class_by_name
from helm_support import CONTEXT, build_card, tokenizer_dir

from flexeval.benchmark.helm.models import ModelCard, read_special_tokens, register
from flexeval.errors import ConfigError


def test_a_setting_is_a_model_of_its_own() -> None:
    assert build_card().deployment == "flexeval/tiny"
    assert build_card(setting="w4").deployment == "flexeval/tiny-w4"


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "flexeval/tiny model", ""])
def test_a_name_that_helm_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a model's name"):
        build_card(name=name)


def test_registries_know_the_model(tmp_path: Path) -> None:
    register(build_card(name="flexeval/known", setting="w4"), tmp_path)
    assert get_default_model_deployment_for_model("flexeval/known-w4") == "flexeval/known-w4"
    deployment = get_model_deployment("flexeval/known-w4")
    assert (deployment.max_request_length, deployment.max_sequence_length) == (CONTEXT, CONTEXT - 1)
    assert deployment.client_spec.args == {
        "model": "tiny",
        "setting": "w4",
        "added_prefix": "",
        "apply_chat_template": False,
    }
    assert get_class_by_name(deployment.client_spec.class_name).__name__ == "FlexevalClient"
    config = get_tokenizer_config("flexeval/known")
    assert (config.end_of_text_token, config.prefix_token) == ("<eos>", "<s>")
    assert not model_has_tag("flexeval/known-w4", INSTRUCTION_FOLLOWING_MODEL_TAG)


def test_room_is_left_for_a_token_that_the_tokenizer_adds(tmp_path: Path) -> None:
    special = register(build_card(name="flexeval/room", adds_bos=True), tmp_path)
    assert (special.added_prefix, special.num_added) == ("<s>", 1)
    assert get_model_deployment("flexeval/room-bos").max_request_length == CONTEXT - 1


def test_instruct_models_are_told_apart(tmp_path: Path) -> None:
    card = ModelCard(
        name="flexeval/instruct",
        model="tiny",
        setting="none",
        tokenizer_dir=tokenizer_dir(),
        max_sequence_length=CONTEXT,
        is_instruct=True,
    )
    register(card, tmp_path)
    assert model_has_tag("flexeval/instruct", INSTRUCTION_FOLLOWING_MODEL_TAG)


def test_files_hold_every_setting_once(tmp_path: Path) -> None:
    for setting in ("none", "w4", "none"):
        register(build_card(name="flexeval/filed", setting=setting), tmp_path)
    files = {path.stem: yaml.safe_load(path.read_text()) for path in tmp_path.glob("*.yaml")}
    assert [model["name"] for model in files["model_metadata"]["models"]] == ["flexeval/filed-w4", "flexeval/filed"]
    assert [one["name"] for one in files["tokenizer_configs"]["tokenizer_configs"]] == ["flexeval/filed"]
    assert len(files["model_deployments"]["model_deployments"]) == 2


def test_helms_tools_read_the_files(tmp_path: Path) -> None:
    register(build_card(name="flexeval/read", setting="w4"), tmp_path)
    written = get_model_deployment("flexeval/read-w4")
    register_configs_from_directory(str(tmp_path))
    assert get_model_deployment("flexeval/read-w4") == written
    assert get_model_deployment("flexeval/read-w4") is not written
    assert get_model_metadata("flexeval/read-w4").display_name == "read (w4)"


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir())
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        read_special_tokens(tmp_path)
