"""The presets have the published models' sizes."""

import pytest

from flexeval.presets import PRESETS

# From the models' published safetensors, but for opt-66b and opt-175b: those follow from table 1 of the OPT paper
# (arXiv 2205.01068), as 12 L h^2 + 13 L h + (50272 + 2050 + 2) h.
PUBLISHED_NUM_PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(PRESETS[name])
    num_layers = fields.pop("num_hidden_layers")

    def num_parameters(layers: int) -> int:
        config = AutoConfig.for_model(**fields, num_hidden_layers=layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters())

    one, two = num_parameters(1), num_parameters(2)
    assert one + (num_layers - 1) * (two - one) == PUBLISHED_NUM_PARAMETERS[name]
